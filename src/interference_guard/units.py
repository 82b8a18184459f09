"""Unit views: every weight read as ``(units, width)``, a unit being one vector of the residual stream.

A matrix that reads from the residual stream (q, k, v, gate, up, router, lm_head, embedding) has one unit a
row; one that writes to it (o, down) has one unit a column. `torch.nn.Linear` stores ``(out, in)``, the
`Conv1D` of GPT-2 ``(in, out)``, so there the axes are exchanged. Stacks of experts are read expert by
expert. LoRA factors and unknown names have their last axis as width. A neuron joins the gate row, the up
row and the down column of one channel of an MLP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import ConfigError, ShapeError

Kind = Literal["row", "column", "vector"]

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Layers of an MLP whose output channels are its neurons, and those that read the channels back.
CHANNELS_OUT = frozenset(
    (
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "c_fc",
        "fc1",
        "fc_in",
        "w1",
        "w3",
        "wi",
        "wi_0",
        "wi_1",
        "dense_h_to_4h",
        "input_linear",
    )
)
CHANNELS_IN = frozenset(("down_proj", "c_proj", "fc2", "fc_out", "w2", "wo", "dense_4h_to_h", "output_linear"))
# Linear layers whose output is added to the residual stream.
WRITERS = CHANNELS_IN | {"o_proj", "out_proj", "dense"}
FUSED = frozenset(("gate_up_proj", "input_linear"))
# Stacks of experts in modules that are not called so, those of Granite and JetMoE.
STACKS = frozenset(("input_linear", "output_linear"))
# Saved models whose layers compute x W and are stored (in, out), by the `model_type` of their config.json: names
# of the layers, or of the modules that hold stacks of experts.
CONV1D = frozenset(("c_attn", "q_attn", "c_fc", "c_proj"))
TRANSPOSED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "gpt2": CONV1D,
        "openai-gpt": CONV1D,
        "imagegpt": CONV1D,
        "decision_transformer": CONV1D,
        "gpt_oss": frozenset(("experts",)),
        "llama4": frozenset(("experts",)),
        "llama4_text": frozenset(("experts",)),
    }
)
# Modules in memory that do so and have no mark of it.
TRANSPOSED_TYPES = frozenset(("Conv1D", "Llama4TextExperts", "AriaGroupedExpertsGemm"))


def canonical_name(name: str) -> str:
    """A parameter's name without what DDP, `torch.compile`, FSDP and checkpointing wrap around modules.

    >>> canonical_name("module._orig_mod.model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class UnitView:
    """How one parameter is read as units.

    Args:
        name: Canonical name of the parameter.
        kind: ``"row"`` (the last axis is the width), ``"column"`` (the last but one is), or ``"vector"``
            (the whole parameter is one unit).
        shape: The parameter's shape.
        stacked: Whether the first of three axes counts experts.
        neuron: Name of the MLP whose channels the units belong to, or None where units stand alone.
        channels: Channels of that MLP (of one expert); a fused gate-and-up matrix has twice as many units.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    stacked: bool = False
    neuron: str | None = None
    channels: int = 0

    @property
    def width(self) -> int:
        """Length of a unit."""
        if self.kind == "vector":
            return math.prod(self.shape)
        return self.shape[-1] if self.kind == "row" else self.shape[-2]

    @property
    def units(self) -> int:
        """Number of units; for a stack over all experts."""
        return math.prod(self.shape) // max(self.width, 1)

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor as ``(units, width)``, or ``(experts, units of one, width)`` for a stack.

        Args:
            tensor: The parameter, its gradient, or any tensor of its shape.

        Returns:
            A view: writing to it writes to `tensor`.

        Raises:
            ShapeError: If the shape is another one, or the memory layout allows no such view.
        """
        if tuple(tensor.shape) != self.shape:
            raise ShapeError(
                f"{self.name} has shape {tuple(tensor.shape)}, its unit view was made for {self.shape}. "
                "Build the guard on the model that is trained, after its layers are in their final shape."
            )
        if self.kind == "vector":
            return self._flat(tensor, (1, self.width))
        if self.kind == "column":
            return tensor.mT
        if tensor.dim() == 2 or self.stacked:
            return tensor
        return self._flat(tensor, (self.units, self.width))

    def _flat(self, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
        try:
            return tensor.view(shape)
        except RuntimeError as error:
            raise ShapeError(
                f"{self.name}, {self.shape} with strides {tensor.stride()}, cannot be read as {shape} without "
                "a copy. Make the parameter contiguous before training."
            ) from error

    def neuron_index(self) -> Tensor | None:
        """Each unit's neuron within its MLP, ``(units,)`` int64 on the CPU, or None where units stand alone."""
        if self.neuron is None:
            return None
        experts = self.shape[0] if self.stacked else 1
        index = torch.arange(self.units // experts, device="cpu") % self.channels
        return (torch.arange(experts, device="cpu").unsqueeze(1) * self.channels + index).flatten()


class UnitLayout:
    """Unit views of a model's parameters, by canonical name.

    Args:
        parameters: Names and tensors; names may still carry wrappers.
        overrides: Kind by name pattern (`fnmatch`, on canonical names); the first match wins over the
            built-in rules.
        module: The model, read to find layers that store their weights transposed.
        transposed: Names of such layers where there is no model, as `stored_transposed` gives them.

    Raises:
        ConfigError: If a pattern matches no parameter, or asks for columns of a 1-D weight.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        overrides: Mapping[str, str] = MappingProxyType({}),
        *,
        module: nn.Module | None = None,
        transposed: Iterable[str] = (),
    ) -> None:
        shapes = {canonical_name(name): tuple(tensor.shape) for name, tensor in parameters}
        flipped = _transposed_layers(module) | frozenset(transposed)
        owners = {name.rpartition(".")[0] for name in shapes}
        self.transposed = frozenset(name for name in flipped if name in owners)
        """Layers with a parameter here that store it transposed."""
        unused = set(overrides)
        kinds: dict[str, Kind] = {}
        for name, shape in shapes.items():
            pattern = next((item for item in overrides if fnmatchcase(name, item)), None)
            if pattern is None:
                kinds[name] = _kind(name, shape, flipped)
                continue
            unused.discard(pattern)
            kinds[name] = _chosen(name, shape, pattern, overrides[pattern])
        if unused:
            _check_reached(sorted(unused)[0], overrides, shapes)
            raise ConfigError(
                f"unit_overrides pattern {sorted(unused)[0]!r} matches no trainable parameter. "
                f"Names look like {next(iter(shapes), '')!r}; use a pattern with * or remove the entry."
            )
        channels = _channels(shapes, kinds, flipped)
        self.views: dict[str, UnitView] = {
            name: UnitView(name, kinds[name], shape, _is_stack(name, shape), *channels.get(name, (None, 0)))
            for name, shape in shapes.items()
        }


def _check_reached(pattern: str, overrides: Mapping[str, str], names: Iterable[str]) -> None:
    """Earlier patterns may take all that one of them matches."""
    first = next((name for name in names if fnmatchcase(name, pattern)), None)
    if first is not None:
        before = next(item for item in overrides if fnmatchcase(first, item))
        raise ConfigError(
            f"unit_overrides pattern {pattern!r} is never reached: {before!r} stands before it and takes "
            f"{first!r}. The first pattern that matches decides; put the narrower one first."
        )


def _layer(name: str) -> tuple[str, str, bool]:
    """A parameter's parent module, layer name and whether it is a LoRA factor; adapter levels are skipped."""
    parts = name.split(".")
    lora = any(part.startswith("lora_") for part in parts)
    kept: list[str] = []
    skip = False
    for part in parts:
        if skip or part == "base_layer":
            skip = False
        elif part == "modules_to_save":
            skip = True
        else:
            kept.append(part)
    if kept and kept[-1] in ("weight", "bias"):
        kept.pop()
    return ".".join(kept[:-1]), kept[-1] if kept else "", lora


def _is_stack(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and ("experts" in name.split(".") or _layer(name)[1] in STACKS)


def stored_transposed(model_type: str | None, names: Iterable[str]) -> frozenset[str]:
    """Layers of a saved model that store their weights transposed.

    Args:
        model_type: From its config.json.
        names: Canonical names of its parameters.

    >>> sorted(stored_transposed("gpt2", ["h.0.mlp.c_fc.weight", "h.0.ln_1.weight"]))
    ['h.0.mlp.c_fc']
    """
    layers = TRANSPOSED.get(model_type or "", frozenset())
    owners = {name.rpartition(".")[0] for name in names}
    return frozenset(owner for owner in owners if owner.rpartition(".")[2] in layers)


def _transposed_layers(module: nn.Module | None) -> frozenset[str]:
    """Modules that compute ``x W`` instead of ``x W'``."""
    if module is None:
        return frozenset()
    return frozenset(
        canonical_name(name)
        for name, layer in module.named_modules()
        # By its bases too: fully_shard gives a module a class of its own.
        if not TRANSPOSED_TYPES.isdisjoint(kind.__name__ for kind in type(layer).__mro__)
        or getattr(layer, "is_transposed", False) is True
    )


def _kind(name: str, shape: tuple[int, ...], flipped: frozenset[str]) -> Kind:
    if len(shape) < 2:
        return "vector"
    _, layer, lora = _layer(name)
    # Biases of stacked experts are matrices, with a row for each expert however the stack is stored.
    if lora or layer.endswith("_bias") or (len(shape) > 2 and not _is_stack(name, shape)):
        return "row"
    # Conv1D is the layer itself; a transposed stack of experts is a parameter of such a module.
    owner = name.rpartition(".")[0]
    writes = layer in WRITERS
    return "column" if writes != (owner in flipped) else "row"


def _chosen(name: str, shape: tuple[int, ...], pattern: str, kind: str) -> Kind:
    if kind not in ("row", "column", "vector"):
        raise ConfigError(
            f"unit_overrides gives {pattern!r} the kind {kind!r}; it must be one of ['row', 'column', 'vector']."
        )
    if kind == "column" and (len(shape) < 2 or (len(shape) > 2 and not _is_stack(name, shape))):
        raise ConfigError(
            f"unit_overrides asks for columns of {name!r}, which has shape {shape}. Columns exist for matrices "
            "and stacks of experts; use 'row' or 'vector'."
        )
    if kind == "row" and len(shape) < 2:
        return "vector"
    return kind  # type: ignore[return-value]


def _channels(
    shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, Kind], flipped: frozenset[str]
) -> dict[str, tuple[str, int]]:
    """MLP and channel count of the parameters whose units belong to neurons."""
    found: dict[str, dict[str, str]] = {}
    for name, shape in shapes.items():
        parent, layer, lora = _layer(name)
        # Transposed stacks (GPT-OSS) interleave gate and up: their units stand alone.
        if not lora and len(shape) >= 2 and layer in CHANNELS_OUT | CHANNELS_IN and parent not in flipped:
            found.setdefault(parent, {})[layer] = name
    result: dict[str, tuple[str, int]] = {}
    for parent, layers in found.items():
        readers = {layer: name for layer, name in layers.items() if layer in CHANNELS_OUT}
        writers = {layer: name for layer, name in layers.items() if layer in CHANNELS_IN}
        if not readers or len(writers) != 1:
            continue
        counts = set()
        for layer, name in (readers | writers).items():
            # Axis of the units: the one that is not the width.
            count = shapes[name][-2] if kinds[name] == "row" else shapes[name][-1]
            counts.add(count / 2 if layer in FUSED else count)
        if len(counts) == 1 and (channels := counts.pop()) == int(channels):
            for name in (readers | writers).values():
                result[name] = (parent, int(channels))
    return result
