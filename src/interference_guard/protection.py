"""Scores behind a domain's protected set, and the rows a local model anchors."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks import Block
from .local_model import see_through
from .protected import ProtectedSet, random_units, select_units

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard


def by_parameter(blocks: Sequence[Block], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Per-block ``(matrices, units)`` values as a ``(units,)`` tensor a parameter."""
    table: dict[str, Tensor] = {}
    for block, value in zip(blocks, values, strict=True):
        for view, part in zip(block.views, value.chunk(len(block.views)), strict=True):
            table[view.name] = part.reshape(-1)
    return table


def protected_rows(state: DomainState, guard: Guard, energies: Sequence[Tensor]) -> list[Tensor | None]:
    """Choose a domain's protected units; sets its `protected_set` and `half_set`.

    Args:
        state: The domain.
        guard: Its guard.
        energies: Per block the energy of every unit, ``(matrices, units)``.

    Returns:
        Per block the flattened indices of the chosen units, or None for all.
    """
    config, views = guard.config, guard.view.layout.views
    scores = by_parameter(guard.view.blocks, energies)
    state.half_set = select_units(scores, views, 0.5)
    if config.coverage >= 1:
        state.protected_set = select_units(scores, views, 1.0)
        return [None for _ in guard.view.blocks]
    chosen = select_units(scores, views, config.coverage)
    if config.selection == "random":
        # Each domain draws its own: one draw for all would make their sets parts of each other.
        generator = torch.Generator().manual_seed(config.seed + zlib.crc32(state.name.encode()))
        chosen = random_units(chosen, scores, views, generator)
    elif config.selection == "edits":
        # A recovery is no training of the domain's own, after which it keeps what its own has chosen.
        chosen = _most_edited(state, guard) or state.protected_set or chosen
    state.protected_set = chosen
    return rows_of(chosen, guard.view.blocks, guard.device)


def _most_edited(state: DomainState, guard: Guard) -> ProtectedSet | None:
    """The units that the domain's training has moved most; None where it had none, or nothing has moved."""
    if state.start is None:
        return None
    # The weights seen through random directions stand for them when edits are estimated: few numbers a unit.
    spread = guard.view.spread
    now = see_through(guard.view.weights(), guard.view.edits, spread)
    edits = [a - b for a, b in zip(now, state.start, strict=True)]
    edits = edits if spread is None else spread.whole_units(edits)
    moved = [edit.square().sum(-1) for edit in edits]
    if not any(part.any() for part in moved):
        return None
    return select_units(by_parameter(guard.view.blocks, moved), guard.view.layout.views, guard.config.coverage)


def rows_of(chosen: ProtectedSet, blocks: Sequence[Block], device: torch.device) -> list[Tensor | None]:
    """A protected set as flattened unit indices per block."""
    rows: list[Tensor | None] = []
    for block in blocks:
        mask = torch.cat([chosen.masks[view.name] for view in block.views])
        rows.append(None if bool(mask.all()) else mask.nonzero().flatten().to(device))
    return rows
