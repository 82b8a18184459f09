"""A piece of a parameter that is a range of its row-major elements, as DeepSpeed's ZeRO cuts them.

Such a range may begin and end in the middle of a row. Its box in unit view is then the rows it touches, with
zeros for what other ranks hold: sums over ranks come out right, and of a change of the box the range is taken.
Where every cut falls between rows the box is the range itself and nothing is copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .units import UnitView


@dataclass(frozen=True)
class Cut:
    """Where ranks cut a parameter: the same on all of them.

    Args:
        offset: Index of the parameter's first element in the buffer that the ranks share out.
        size: Elements of that buffer that each rank holds.
    """

    offset: int
    size: int

    def range(self, rank: int, numel: int) -> tuple[int, int]:
        """First element of the parameter on a rank, and the one after its last; empty is ``(0, 0)``."""
        start = max(rank * self.size - self.offset, 0)
        stop = min((rank + 1) * self.size - self.offset, numel)
        return (start, stop) if start < stop else (0, 0)

    def falls_on(self, step: int, numel: int) -> bool:
        """Whether all cuts inside the parameter are at multiples of `step` elements."""
        first = -self.offset % self.size
        return all(cut % step == 0 for cut in range(first, numel, self.size))

    def owner(self, numel: int) -> int | None:
        """The rank that holds all of the parameter, None where several share it."""
        first, last = self.offset // self.size, (self.offset + numel - 1) // self.size
        return first if first == last else None


@dataclass(frozen=True)
class Held:
    """The range held here, and how its elements are numbered in a block.

    Args:
        start: First element.
        stop: The one after the last.
        strides: Elements from one matrix, unit and width index to the next; 0 for the members of a block.
    """

    start: int
    stop: int
    strides: tuple[int, int, int]

    def first_elements(self, shape: tuple[int, int], axis: int, device: torch.device) -> Tensor:
        """Which units (`axis` 1) or width indices (`axis` 2) begin here, bool ``(matrices, shape[1])``.

        Over all ranks each begins once, so this deals what only one rank may take.
        """
        matrices = torch.arange(shape[0], device=device).unsqueeze(1) * self.strides[0]
        place = matrices + torch.arange(shape[1], device=device) * self.strides[axis]
        return (place >= self.start) & (place < self.stop)


@dataclass(frozen=True)
class FlatView:
    """How the range of one parameter held here is read in unit view; stands in for its `UnitView`.

    Args:
        whole: The unit view of the whole parameter.
        start: First element held here.
        stop: The one after the last.
    """

    whole: UnitView
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Canonical name of the parameter."""
        return self.whole.name

    @property
    def by_width(self) -> bool:
        """Whether rows in memory are width indices and not units."""
        return self.whole.kind != "row"

    @property
    def memory(self) -> tuple[int, int, int]:
        """Matrices, rows of each, and elements of a row, as they follow each other in memory."""
        shape = self.whole.shape
        matrices = shape[0] if self.whole.stacked else 1
        if self.whole.kind == "vector":
            return 1, math.prod(shape), 1
        return matrices, math.prod(shape[:-1]) // matrices, shape[-1]

    @property
    def rows(self) -> tuple[int, int, int, int]:
        """The box in memory: first matrix, the one after the last, first row of each, the one after the last."""
        matrices, rows, length = self.memory
        if self.start == self.stop:
            return 0, matrices, 0, 0
        first, last = self.start // length, (self.stop - 1) // length
        if first // rows == last // rows:
            return first // rows, first // rows + 1, first % rows, last % rows + 1
        return first // rows, last // rows + 1, 0, rows

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """The box in the parameter's own ``(matrices, units, width)``; without elements it has no unit."""
        matrices, _, length = self.memory
        first, last, low, high = self.rows
        if self.start == self.stop:
            return slice(0, matrices), slice(0, 0), slice(0, self.memory[1] if self.by_width else length)
        if self.by_width:
            return slice(first, last), slice(0, length), slice(low, high)
        return slice(first, last), slice(low, high), slice(0, length)

    @property
    def held(self) -> Held:
        """The range, numbered for a block of this parameter alone."""
        _, rows, length = self.memory
        within = (1, length) if self.by_width else (length, 1)
        return Held(self.start, self.stop, (rows * length if self.whole.stacked else 0, *within))

    @property
    def padding(self) -> tuple[int, int]:
        """Elements of the box before the range and after it, which other ranks hold."""
        if self.start == self.stop:
            return 0, 0
        _, rows, length = self.memory
        first, last, low, high = self.rows
        begin = (first * rows + low) * length
        end = ((last - 1) * rows + high) * length
        return self.start - begin, end - self.stop

    def view(self, tensor: Tensor) -> Tensor:
        """The range as its box, ``(units, width)`` or ``(experts, units, width)``: a view where it fills it.

        Args:
            tensor: The range, ``(stop - start,)``.
        """
        if self.start == self.stop:
            sizes = [piece.stop - piece.start for piece in self.box]
            return tensor.new_zeros(sizes if self.whole.stacked else sizes[1:])
        before, after = self.padding
        if before or after:
            tensor = torch.nn.functional.pad(tensor, (before, after))
        first, last, low, high = self.rows
        box = tensor.view(last - first, high - low, self.memory[2])
        box = box if self.whole.stacked else box.squeeze(0)
        return box.mT if self.by_width else box

    def back(self, box: Tensor) -> Tensor:
        """Of a tensor laid out as `view` the range, ``(stop - start,)``."""
        before, _ = self.padding
        flat = (box.mT if self.by_width else box).reshape(-1)
        return flat[before : before + self.stop - self.start]
