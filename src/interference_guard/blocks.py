"""Weights of one shape, stacked, so that many small matrices cost one call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from .flat import FlatView
from .regions import Region
from .shards import Shards
from .units import UnitLayout, UnitView

# Above this many elements a matrix is a block of its own and is read where it lies, without a copy.
STACK_LIMIT = 1 << 18


@dataclass(frozen=True)
class Block:
    """Equal unit views, handled as one ``(matrices, units, width)`` batch.

    Args:
        views: The unit views, all of one ``(units, width)``; a single one may hold a stack of experts.
        matrices: Length of the batch.
        units: Units of one matrix of the batch.
        width: Length of a unit.
        region: What of the batch lies on this rank.
        pieces: The unit views of the members' pieces here; the views themselves in a single process.
    """

    views: tuple[UnitView, ...]
    matrices: int
    units: int
    width: int
    region: Region
    pieces: tuple[UnitView | FlatView, ...]

    @property
    def name(self) -> str:
        """A key for saved state: the first member's name."""
        return self.views[0].name

    @property
    def numel(self) -> int:
        """Elements of all members."""
        return self.matrices * self.units * self.width

    @property
    def padded(self) -> bool:
        """Whether a member's box holds more than the piece here, so that its view is a copy."""
        return any(isinstance(piece, FlatView) and any(piece.padding) for piece in self.pieces)

    def targets(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Unit views of the members' pieces; writing to them writes to `tensors`, unless `padded`."""
        return [view.view(tensors[view.name]) for view in self.pieces]

    def gather(self, tensors: Mapping[str, Tensor | None], device: torch.device | None = None) -> Tensor:
        """Pieces of the members as one ``(matrices, units, width)`` fp32 tensor; a single fp32 one is not copied.

        A missing tensor (a gradient that is None) reads as zero, on `device` where all are missing.
        """
        found = [None if (tensor := tensors[view.name]) is None else view.view(tensor) for view in self.pieces]
        present = next((item for item in found if item is not None), None)
        if present is None:
            return torch.zeros(self.region.size, dtype=torch.float32, device=device)
        if len(found) == 1:
            single = present.float()
            return single if single.dim() == 3 else single.unsqueeze(0)
        # Stacked before they are fp32, so that fp32 copies of the members never exist beside the stack.
        return torch.stack([torch.zeros_like(present) if item is None else item for item in found]).float()


class Blocks(Sequence[Tensor]):
    """A model's tensors in unit view, ``(matrices, units, width)`` fp32 a block, each made when it is asked for.

    A block that is one fp32 matrix shares the tensor's memory and costs nothing. Low precision is turned into
    fp32 anew at each access. Small matrices are stacked, and of fp32 the stack is kept. A list of all blocks
    would be a copy of the model. So go over them once, by index, and let go of a block before the next: a loop
    over the sequence itself still holds one while the next is made.

    Args:
        blocks: Of the model.
        tensors: The pieces that lie here by canonical name, in their own dtype; None reads as zero. They are
            held, and read when a block is made.
        device: Of blocks without any tensor.
        divisor: What all tensors are divided by as they are read; 0-d, or None.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        tensors: Mapping[str, Tensor | None],
        device: torch.device | None = None,
        divisor: Tensor | None = None,
    ) -> None:
        self._blocks = blocks
        self._tensors = tensors
        self._device = device
        self._divisor = divisor
        self._stacks: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Blocks: ...

    def __getitem__(self, index: int | slice) -> Tensor | Blocks:
        if isinstance(index, slice):
            return Blocks(self._blocks[index], self._tensors, self._device, self._divisor)
        found = self._gathered(index)
        return found if self._divisor is None else found / self._divisor.to(found.device)

    def _gathered(self, index: int) -> Tensor:
        block = self._blocks[index]
        tensors = [self._tensors[view.name] for view in block.pieces]
        # Stacks are of small matrices, and reading one twice should not copy it twice.
        if len(tensors) > 1 and all(item is not None and item.dtype == torch.float32 for item in tensors):
            if index not in self._stacks:
                self._stacks[index] = block.gather(self._tensors, self._device)
            return self._stacks[index]
        return block.gather(self._tensors, self._device)

    @property
    def versions(self) -> list[int]:
        """How often each tensor behind the blocks was changed in place; two equal lists mean the same values."""
        return [tensor._version for tensor in self._tensors.values() if tensor is not None]


def make_blocks(layout: UnitLayout, tensors: Mapping[str, Tensor], shards: Shards) -> list[Block]:
    """Group a layout's views: small ones of one shape, dtype and device together, each large one alone.

    Args:
        layout: The unit views of whole parameters.
        tensors: The pieces of the parameters that lie here, by canonical name.
        shards: Where the pieces belong. Ranks group alike, because whole shapes decide.
    """
    groups: dict[tuple[object, ...], list[UnitView]] = {}
    for name, view in layout.views.items():
        tensor = tensors[name]
        # Fails here, before training, where the memory layout allows no unit view.
        shards.view(view).view(tensor)
        shape = _shape(view)
        key: tuple[object, ...] = (*shape, tensor.dtype, tensor.device, shards.cut(view))
        if len(shape) == 3 or math.prod(shape) > STACK_LIMIT:
            key = (*key, name)
        groups.setdefault(key, []).append(view)
    return [_block(views, shards) for views in groups.values()]


def _shape(view: UnitView) -> tuple[int, ...]:
    return tuple(view.view(torch.empty(view.shape, device="meta")).shape)


def block_shape(views: Sequence[UnitView]) -> tuple[int, int, int]:
    """Matrices, units and width of the block these views make."""
    shape = _shape(views[0])
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (len(views), shape[0], shape[1])


def _block(views: Sequence[UnitView], shards: Shards) -> Block:
    size = block_shape(views)
    region = shards.region(views, size)
    return Block(tuple(views), *size, region, tuple(shards.view(view) for view in views))
