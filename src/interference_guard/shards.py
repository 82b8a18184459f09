"""Which part of each parameter this rank holds, and the one sum over ranks; nothing else knows sharding.

A sharded parameter (a DTensor, as `fully_shard` makes them) lies in pieces on the ranks of one group, cut
along one axis. In unit view a piece is a box of ``(matrices, units, width)``. Where the cut goes between units
(rows of q or gate under `fully_shard`), everything about a unit is known to one rank. Where it goes through
them (columns of o and down), a rank knows a part of each unit's width: products with directions are then sums
over ranks. Both cases, and parameters that every rank holds whole, become one rule: each rank writes what it
knows into zeros, and one sum of one flat buffer makes it whole on all ranks. DeepSpeed's ZeRO cuts between any
two elements; `flat` says which box such a range is, and the same rule holds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import HostError, ShapeError, UnsupportedError
from .flat import Cut, FlatView
from .regions import Region
from .units import UnitView
from .zero import Zero, is_put_away, whole_shape

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Part:
    """This rank's piece of one parameter.

    Args:
        shape: Shape of the whole parameter.
        axis: Axis it is cut along, or None where this rank holds all of it.
        start: First index of the piece on that axis.
        length: Indices of the piece on that axis.
        cut: Where it is cut between elements and not along an axis; the piece is then the range of elements
            from `start` on, `length` long.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    start: int = 0
    length: int = 0
    cut: Cut | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the piece."""
        if self.cut is not None:
            return (self.length,)
        return tuple(self.length if axis == self.axis else size for axis, size in enumerate(self.shape))


class Shards:
    """The pieces of a model's parameters on this rank.

    Args:
        parameters: By canonical name.
        zero: The buffers of the DeepSpeed engine that trains them, or None.

    Raises:
        UnsupportedError: If a parameter is cut in a way the guard cannot follow.
    """

    def __init__(self, parameters: Mapping[str, Tensor], zero: Zero | None = None) -> None:
        self.parts: dict[str, Part] = {}
        self.group: Any = None
        self.zero = zero
        self.holders = max(
            (tensor.device_mesh.size() for tensor in parameters.values() if is_sharded(tensor)), default=None
        )
        """Ranks that hold pieces of the parameters, copies included; None where nothing says."""
        self.managed = zero is not None or any(is_sharded(tensor) for tensor in parameters.values())
        """Whether an engine takes their gradients, so that its own backward passes alone reach them."""
        if zero is not None:
            for name, tensor in parameters.items():
                place = zero.place(name, tensor)
                self.parts[name] = _range(whole_shape(tensor), place.cut, zero.rank)
                zero.check(name, tensor)
            self.group, self.rank, self.world = zero.group, zero.rank, zero.world
            self.holders = zero.world
            return
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
    def planned(
        cls, cuts: Mapping[str, tuple[tuple[int, ...], int | Sequence[int] | None]], rank: int, world: int
    ) -> Shards:
        """The pieces on another rank, or in another run; without a group, so that nothing can be summed.

        Args:
            cuts: By canonical name the whole shape of a parameter and how it is cut, as `cuts` gives it, or None.
            rank: The rank.
            world: Number of ranks.
        """
        found = cls({})
        for name, (shape, cut) in cuts.items():
            if cut is None or world == 1:
                found.parts[name] = Part(shape)
            elif isinstance(cut, int):
                found.parts[name] = _piece(shape, cut, rank, world)
            else:
                found.parts[name] = _range(shape, Cut(*cut), rank)
        found.rank, found.world = rank, world
        return found

    @property
    def cuts(self) -> dict[str, int | list[int]]:
        """How the cut parameters are cut: the axis, or offset and size of a `Cut`."""
        found: dict[str, int | list[int]] = {}
        for name, part in self.parts.items():
            if part.cut is not None:
                found[name] = [part.cut.offset, part.cut.size]
            elif part.axis is not None:
                found[name] = part.axis
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

    def local(self, tensor: Tensor) -> Tensor:
        """What of a parameter lies on this rank, sharing its memory; take it afresh at every step.

        Engines swap the memory behind a sharded parameter (CPU offload, resharding), so it must not be kept.
        """
        if self.zero is not None:
            return self.zero.master(tensor)
        if is_put_away(tensor):
            # Not yet shared out: there is an optimizer only once training begins.
            return torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")
        return tensor.to_local().detach() if is_sharded(tensor) else tensor

    def gradient(self, name: str, parameter: Tensor) -> Tensor | None:
        """The piece of a parameter's gradient that belongs to the parameter's own piece.

        Raises:
            UnsupportedError: If the gradient is not laid out as its parameter.
            HostError: If a DeepSpeed engine has it and the guard was not built on that engine.
        """
        if self.zero is not None:
            return self.zero.gradient(name, parameter)
        gradient = parameter.grad
        if gradient is None and (is_put_away(parameter) or hasattr(parameter, "_hp_mapping")):
            raise HostError(
                f"Parameter {name!r} belongs to a DeepSpeed engine, whose optimizer steps on parts of it. Build "
                "the guard on what deepspeed.initialize returned, Guard(engine), and attach it to its optimizer."
            )
        if gradient is None or not (is_sharded(gradient) and is_sharded(parameter)):
            return gradient
        if gradient.placements != parameter.placements:
            raise UnsupportedError(
                f"The gradient of {name!r} is placed as {gradient.placements}, "
                f"the parameter as {parameter.placements}. "
                "Gradients must be reduced before the optimizer steps, as fully_shard does."
            )
        return self.local(gradient)

    def publish(self, parameters: Iterable[Tensor]) -> None:
        """Call after pieces were changed: an engine may keep the weights the model computes with elsewhere."""
        if self.zero is not None:
            for tensor in parameters:
                self.zero.publish(tensor)

    def view(self, view: UnitView) -> UnitView | FlatView:
        """The unit view of the local piece of one parameter."""
        part = self.parts[view.name]
        if part.cut is not None:
            return FlatView(view, part.start, part.start + part.length)
        return view if part.axis is None else replace(view, shape=part.local_shape)

    def cut(self, view: UnitView) -> object:
        """Where a parameter is cut in unit view, equal for parameters that may share a block."""
        part = self.parts[view.name]
        if part.cut is not None:
            owner = part.cut.owner(math.prod(part.shape))
            return (part.cut, view.kind == "row") if owner is None else owner
        return None if part.axis is None else (_unit_axis(view, part.axis)[0], part.shape[part.axis])

    def region(self, views: Sequence[UnitView], shape: tuple[int, int, int]) -> Region:
        """The region of a block of equally sharded parameters; `shape` is the whole block's."""
        view, part = views[0], self.parts[views[0].name]
        axes = [slice(0, size) for size in shape]
        if part.cut is not None:
            piece = FlatView(view, part.start, part.start + part.length)
            matrices, units, width = piece.box
            # Members of a block follow each other in it, and each is cut alike.
            matrices = matrices if view.stacked else axes[0]
            _, rows, length = piece.memory
            whole = part.cut.falls_on(rows * length if piece.by_width else length, math.prod(part.shape))
            return Region(shape, (matrices, units, width), True, not whole, piece.held)
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
        """Per-block products of units with directions, made whole; where units are cut every rank has them so."""
        full = [
            value if region.split else region.spread_units(value)
            for region, value in zip(self.regions, values, strict=True)
        ]
        self.add([value for region, value in zip(self.regions, full, strict=True) if not region.split])
        return full

    def whole_across(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Per-block sums over the units here, summed over all units: ``(matrices, width, n)``."""
        full = [region.spread_across(value) for region, value in zip(self.regions, values, strict=True)]
        self.add(full)
        return full

    def own(self, index: int, matrix: Tensor) -> Tensor:
        """This rank's part of a block's whole ``(matrices, width, n)`` sum; see `Region.own`."""
        return self.regions[index].own(matrix, self.shards.rank == 0)


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


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor; by name, so that its module is not imported where nobody uses it."""
    return type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor"


def _ranks(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)


def _part(name: str, tensor: Tensor) -> tuple[Part, Any]:
    shape = whole_shape(tensor)
    if not is_sharded(tensor):
        return Part(shape), None
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    cuts = [(place, item.dim) for place, item in enumerate(placements) if type(item) is Shard]
    if len(cuts) > 1 or any(type(item) not in (Shard, Replicate) for item in placements):
        raise UnsupportedError(
            f"Parameter {name!r} is placed as {tuple(map(str, placements))}. The guard follows parameters that "
            "are cut along one axis over one mesh dimension (Shard) and copied over the others (Replicate). "
            "Use fully_shard alone, without tensor parallelism."
        )
    if not cuts:
        return Part(shape), None
    ((place, dim),) = cuts
    group, axis = mesh.get_group(place), dim % len(shape)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    part = _piece(shape, axis, rank, world)
    found = tuple(tensor.to_local().shape)
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


def _range(shape: tuple[int, ...], cut: Cut, rank: int) -> Part:
    """A rank's piece as DeepSpeed's ZeRO cuts it: a range of elements."""
    start, stop = cut.range(rank, math.prod(shape))
    return Part(shape, None, start, stop - start, cut)


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
