"""Which part of each parameter this rank holds, and the one sum over ranks; nothing else knows sharding.

A sharded parameter (a DTensor, as `fully_shard` makes them) lies in pieces on the ranks of one group, cut
along one axis. In unit view a piece is a box of ``(matrices, units, width)``. Where the cut goes between units
(rows of q or gate under `fully_shard`), everything about a unit is known to one rank. Where it goes through
them (columns of o and down), a rank knows a part of each unit's width: products with directions are then sums
over ranks. Both cases, and parameters that every rank holds whole, become one rule: each rank writes what it
knows into zeros, and one sum of one flat buffer makes it whole on all ranks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import ShapeError, UnsupportedError
from .units import UnitView

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Part:
    """This rank's piece of one parameter.

    Args:
        shape: Shape of the whole parameter.
        axis: Axis it is cut along, or None where this rank holds all of it.
        start: First index of the piece on that axis.
        length: Indices of the piece on that axis.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    start: int = 0
    length: int = 0

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the piece."""
        return tuple(self.length if axis == self.axis else size for axis, size in enumerate(self.shape))


@dataclass(frozen=True)
class Region:
    """This rank's box of a block's ``(matrices, units, width)``.

    Args:
        shape: The whole block.
        box: What of it lies here.
        owner: Whether this rank adds its box to sums over ranks; only one rank adds what all hold.
        split: Whether units are cut, so that their products need a sum over ranks.
    """

    shape: tuple[int, int, int]
    box: Box
    owner: bool = True
    split: bool = False

    @property
    def size(self) -> tuple[int, int, int]:
        """Shape of the box."""
        matrices, units, width = (piece.stop - piece.start for piece in self.box)
        return matrices, units, width

    def across(self, matrix: Tensor) -> Tensor:
        """The rows of a ``(width, n)`` matrix, or of a ``(matrices, width, n)`` batch, that meet the box."""
        return matrix[self.box[2]] if matrix.dim() == 2 else matrix[self.box[0], self.box[2]]

    def units(self, values: Tensor) -> Tensor:
        """The box's units of ``(matrices, units, ...)`` values; a view."""
        return values[self.box[0], self.box[1]]

    def spread_units(self, values: Tensor) -> Tensor:
        """What this rank adds to a sum: values of the box's units, the rest 0, as ``(matrices, units, ...)``."""
        full = values.new_zeros(*self.shape[:2], *values.shape[2:])
        if self.owner:
            self.units(full).copy_(values)
        return full

    def spread_across(self, matrix: Tensor) -> Tensor:
        """The same for ``(matrices, width, n)`` values of the box, summed over its units."""
        full = matrix.new_zeros(self.shape[0], self.shape[2], *matrix.shape[2:])
        if self.owner:
            self.across(full).copy_(matrix)
        return full

    def own(self, matrix: Tensor, first: bool) -> Tensor:
        """A whole ``(matrices, width, n)`` sum as pieces that add up to it over ranks; a copy.

        Args:
            matrix: The sum, the same on every rank.
            first: Whether this is the first rank, which takes what several could.
        """
        piece = self.across(matrix).clone()
        apart = self.split or self.size[0] < self.shape[0]
        return piece if apart or first else piece.zero_()

    def rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the chosen units lie here.

        Args:
            chosen: Indices into the flattened ``(matrices * units,)``.

        Returns:
            Their places in `chosen`, and their indices into the box's own flattened units.
        """
        matrix, unit = chosen // self.shape[1], chosen % self.shape[1]
        m, u = self.box[0], self.box[1]
        inside = (matrix >= m.start) & (matrix < m.stop) & (unit >= u.start) & (unit < u.stop)
        places = inside.nonzero().flatten()
        local = (matrix[places] - m.start) * self.size[1] + unit[places] - u.start
        return places, local


def whole_region(matrices: int, units: int, width: int) -> Region:
    """The region of a block that lies here whole."""
    return Region((matrices, units, width), (slice(0, matrices), slice(0, units), slice(0, width)))


class Shards:
    """The pieces of a model's parameters on this rank.

    Args:
        parameters: By canonical name.

    Raises:
        UnsupportedError: If a parameter is cut in a way the guard cannot follow.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parts: dict[str, Part] = {}
        self.group: Any = None
        for name, tensor in parameters.items():
            self.parts[name], group = _part(name, tensor)
            if group is not None and self.group is None:
                self.group = group
            elif group is not None and _ranks(group) != _ranks(self.group):
                raise UnsupportedError(
                    f"Parameter {name!r} is sharded over ranks {_ranks(group)}, others over "
                    f"{_ranks(self.group)}. The guard sums over one group: shard all parameters over one "
                    "mesh dimension."
                )
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.world = 1 if self.group is None else dist.get_world_size(self.group)

    @classmethod
    def planned(cls, cuts: Mapping[str, tuple[tuple[int, ...], int | None]], rank: int, world: int) -> Shards:
        """The pieces on another rank, or in another run; without a group, so that nothing can be summed.

        Args:
            cuts: By canonical name the whole shape of a parameter and the axis it is cut along, or None.
            rank: The rank.
            world: Number of ranks.
        """
        found = cls({})
        found.parts = {
            name: Part(shape) if axis is None or world == 1 else _piece(shape, axis, rank, world)
            for name, (shape, axis) in cuts.items()
        }
        found.rank, found.world = rank, world
        return found

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over several ranks."""
        return self.world > 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum fp32 tensors over ranks, in place, in one collective; a single process leaves them as they are.

        All ranks must call it with the same shapes in the same order. Tensors must be contiguous.
        """
        if not self.sharded or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        for tensor, piece in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))

    def agrees(self, other: Shards) -> bool:
        """Whether another model lies on the ranks in the same pieces."""
        return self.parts == other.parts and (self.rank, self.world) == (other.rank, other.world)

    def view(self, view: UnitView) -> UnitView:
        """The unit view of the local piece of one parameter."""
        part = self.parts[view.name]
        return view if part.axis is None else replace(view, shape=part.local_shape)

    def cut(self, view: UnitView) -> tuple[int, int] | None:
        """Where a parameter is cut in unit view, equal for parameters that may share a block."""
        part = self.parts[view.name]
        return None if part.axis is None else (_unit_axis(view, part.axis)[0], part.shape[part.axis])

    def region(self, views: Sequence[UnitView], shape: tuple[int, int, int]) -> Region:
        """The region of a block of equally sharded parameters; `shape` is the whole block's."""
        view, part = views[0], self.parts[views[0].name]
        axes = [slice(0, size) for size in shape]
        if part.axis is None:
            return Region(shape, (axes[0], axes[1], axes[2]), self.rank == 0)
        place, times = _unit_axis(view, part.axis)
        axes[place] = slice(part.start * times, (part.start + part.length) * times)
        return Region(shape, (axes[0], axes[1], axes[2]), True, place == 2)


@dataclass(frozen=True)
class Spread:
    """A model's blocks as they lie on several ranks.

    Args:
        regions: What of each block lies here.
        shards: Whose sums make them whole.
    """

    regions: Sequence[Region]
    shards: Shards

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum over ranks in place, in one collective; see `Shards.add`."""
        self.shards.add(tensors)

    def whole_units(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Per-block values of the units here, made whole on every rank: ``(matrices, units, ...)``."""
        full = [region.spread_units(value) for region, value in zip(self.regions, values, strict=True)]
        self.add(full)
        return full

    def whole_products(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The same for products with directions, which every rank has whole where units are cut."""
        own = [
            torch.zeros_like(value) if region.split and self.shards.rank else value
            for region, value in zip(self.regions, values, strict=True)
        ]
        return self.whole_units(own)

    def whole_across(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Per-block sums over the units here, summed over all units: ``(matrices, width, n)``."""
        full = [region.spread_across(value) for region, value in zip(self.regions, values, strict=True)]
        self.add(full)
        return full

    def own(self, index: int, matrix: Tensor) -> Tensor:
        """This rank's part of a block's whole ``(matrices, width, n)`` sum; see `Region.own`."""
        return self.regions[index].own(matrix, self.shards.rank == 0)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank, sharing its memory; take it afresh at every step.

    Engines swap the memory behind a sharded parameter (CPU offload, resharding), so it must not be kept.
    """
    return tensor.to_local().detach() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_gradient(name: str, parameter: Tensor) -> Tensor | None:
    """The piece of a parameter's gradient that belongs to the parameter's own piece.

    Raises:
        UnsupportedError: If the gradient is not laid out as its parameter.
    """
    gradient = parameter.grad
    if gradient is None or not is_sharded(gradient):
        return gradient
    if gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        raise UnsupportedError(
            f"The gradient of {name!r} is placed as {gradient.placements}, "  # type: ignore[attr-defined]
            f"the parameter as {parameter.placements}. "  # type: ignore[attr-defined]
            "Gradients must be reduced before the optimizer steps, as fully_shard does."
        )
    return local(gradient)


def reshard(model: nn.Module) -> None:
    """Let the modules of `fully_shard` give back whole parameters that a forward pass left in place.

    They keep them for the backward pass. Without one, the next forward pass would use them again, although an
    optimizer step has changed the pieces since.
    """
    kinds = _fully_sharded()
    for module in model.modules() if kinds else ():
        if isinstance(module, kinds):
            module.reshard()


def _fully_sharded() -> tuple[type[Any], ...]:
    found = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(found, "FSDPModule", None)
    return () if kind is None else (kind,)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; by name, so that its module is not imported where nobody uses it."""
    return type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor"


def _ranks(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)


def _part(name: str, tensor: Tensor) -> tuple[Part, Any]:
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return Part(shape), None
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    cuts = [place for place, item in enumerate(placements) if type(item) is Shard]
    if len(cuts) > 1 or any(type(item) not in (Shard, Replicate) for item in placements):
        raise UnsupportedError(
            f"Parameter {name!r} is placed as {tuple(map(str, placements))}. The guard follows parameters that "
            "are cut along one axis over one mesh dimension (Shard) and copied over the others (Replicate). "
            "Use fully_shard alone, without tensor parallelism."
        )
    if not cuts:
        return Part(shape), None
    group = mesh.get_group(cuts[0])
    axis = placements[cuts[0]].dim % len(shape)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    part = _piece(shape, axis, rank, world)
    found = tuple(local(tensor).shape)
    if found != part.local_shape:
        raise ShapeError(
            f"Parameter {name!r} has a local piece of shape {found} on rank {rank} of {world}, expected was "
            f"{part.local_shape} of {shape}. Only even pieces as fully_shard and distribute_tensor cut them are "
            "known; build the guard after the model is sharded."
        )
    return (part, group) if world > 1 else (Part(shape), None)


def _piece(shape: tuple[int, ...], axis: int, rank: int, world: int) -> Part:
    """A rank's piece as `fully_shard` and `distribute_tensor` cut it: even, the last ones shorter or empty."""
    chunk = math.ceil(shape[axis] / world)
    start = min(rank * chunk, shape[axis])
    return Part(shape, axis, start, min(chunk, shape[axis] - start))


def _unit_axis(view: UnitView, axis: int) -> tuple[int, int]:
    """Axis of ``(matrices, units, width)`` that a parameter's axis maps to, and indices there per index here."""
    last = len(view.shape) - 1
    if view.kind == "vector":
        if axis == 0:
            return 2, math.prod(view.shape[1:])
    elif view.stacked or last == 1:
        order = (1, 2) if view.kind == "row" else (2, 1)
        return (0, *order)[axis - last + 2], 1
    elif axis == last:
        return 2, 1
    elif axis == 0:
        return 1, math.prod(view.shape[1:-1])
    raise UnsupportedError(
        f"Parameter {view.name!r}, {view.shape}, read by {view.kind}, is cut along axis {axis}, so its units lie "
        "in pieces that are no range. Shard it along its first axis."
    )
