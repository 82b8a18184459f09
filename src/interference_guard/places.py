"""Where a domain's curvature and its projections sit: sums by layer and module, for a report."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .protection import by_parameter

if TYPE_CHECKING:
    from .guard import Guard

# Layer (None outside the numbered ones) and module to a number.
Places = dict[tuple[int | None, str], float]

_NUMBER = re.compile(r"\.(\d+)(?=\.)")
# Names that one layer uses for several modules (GPT-2, GPT-NeoX, BERT): they are told apart by their parents'.
_SHARED = frozenset({"c_proj", "dense"})
_SKIPPED = re.compile(r"^(lora_\w+|default|base_layer|modules_to_save|weight|bias|\d+)$")


def place(name: str) -> tuple[int | None, str]:
    """Layer number and module of a parameter; None outside the numbered layers.

    >>> place("model.layers.11.self_attn.q_proj.weight")
    (11, 'q_proj')
    >>> place("model.embed_tokens.weight")
    (None, 'embed_tokens')
    >>> place("transformer.h.0.mlp.c_proj.weight")
    (0, 'mlp.c_proj')
    """
    found = _NUMBER.search(name)
    parts = [part for part in name.partition(".lora_")[0].split(".") if not _SKIPPED.match(part)]
    module = ".".join(parts[-2:] if parts[-1] in _SHARED else parts[-1:]) if parts else name
    return (int(found[1]) if found else None), module


def place_label(name: str) -> str:
    """``layer.module`` of a parameter; the module alone outside the numbered layers.

    >>> place_label("model.layers.11.self_attn.q_proj.weight"), place_label("model.embed_tokens.weight")
    ('11.q_proj', 'embed_tokens')
    """
    layer, module = place(name)
    return module if layer is None else f"{layer}.{module}"


def by_place(values: Iterable[tuple[str, float]]) -> Places:
    """Numbers by parameter summed by layer and module.

    >>> by_place([("layers.0.q_proj.weight", 1.0), ("layers.0.q_proj.bias", 2.0)])
    {(0, 'q_proj'): 3.0}
    """
    found: Places = {}
    for name, value in values:
        key = place(name)
        found[key] = found.get(key, 0.0) + value
    return found


@torch.no_grad()
def curvature_places(guard: Guard) -> dict[str, Places]:
    """Each domain's gradient energy by layer and module; reads the device, and all ranks call it."""
    found = {}
    for name in sorted(guard.domains):
        curvature = guard.domains[name].curvature
        if curvature.sums:
            energies = by_parameter(guard.view.blocks, curvature.energies())
            sums = torch.stack([energy.sum() for energy in energies.values()])
            found[name] = by_place(zip(energies, sums.tolist(), strict=True))
    return _in_order(found, guard)


@torch.no_grad()
def projected_places(guard: Guard) -> dict[str, Places]:
    """Squared length of what projections took for each domain so far, by layer and module; reads the device."""
    found = {}
    blocks = guard.view.blocks
    names = [(block.matrices // len(block.views), view.name) for block in blocks for view in block.views]
    for domain, state in guard.domains.items():
        if state.moved is not None:
            found[domain] = by_place(zip((name for _, name in names), _sums(state.moved, names), strict=True))
    return found


def _sums(values: Tensor, names: list[tuple[int, str]]) -> list[float]:
    pieces = torch.split(values, [count for count, _ in names])
    return torch.stack([piece.sum() for piece in pieces]).tolist()


def _in_order(found: dict[str, Places], guard: Guard) -> dict[str, Places]:
    return {name: found[name] for name in guard.domains if name in found}
