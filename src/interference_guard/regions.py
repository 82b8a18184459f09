"""What of a block of stacked weights lies on this rank, and how its part of a sum meets the whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .flat import Held

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Region:
    """This rank's box of a block's ``(matrices, units, width)``.

    Args:
        shape: The whole block.
        box: What of it lies here.
        owner: Whether this rank adds its box to sums over ranks; only one rank adds what all hold.
        split: Whether units are cut, so that their products need a sum over ranks.
        held: Where the pieces are ranges of elements, whose boxes may meet: the range here.
    """

    shape: tuple[int, int, int]
    box: Box
    owner: bool = True
    split: bool = False
    held: Held | None = None

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
        """What this rank adds to a sum: ``(matrices, width, n)`` values of the box's width, the rest 0."""
        full = matrix.new_zeros(self.shape[0], self.shape[2], *matrix.shape[2:])
        if self.owner:
            self.across(full).copy_(matrix)
        return full

    def whole_units(self, values: Tensor) -> Tensor:
        """What this rank adds to a sum over all units; the values themselves where all units are here."""
        return values if self.size[:2] == self.shape[:2] else self.spread_units(values)

    def own(self, matrix: Tensor, first: bool) -> Tensor:
        """A whole ``(matrices, width, n)`` sum as pieces that add up to it over ranks; a copy.

        Args:
            matrix: The sum, the same on every rank.
            first: Whether this is the first rank, which takes what several could.
        """
        piece = self.across(matrix).clone()
        if self.held is not None:
            begin = self.held.first_elements((self.shape[0], self.shape[2]), 2, matrix.device)
            return piece.mul_(self.across(begin.unsqueeze(-1)))
        apart = self.split or self.size[0] < self.shape[0]
        return piece if apart or first else piece.zero_()

    def own_units(self, values: Tensor, first: bool) -> Tensor:
        """Whole ``(matrices, units, n)`` values as pieces that add up to them; one rank takes a cut unit's."""
        piece = self.units(values).clone()
        if self.held is not None:
            begin = self.held.first_elements(self.shape[:2], 1, values.device)
            mine = self.units(begin)
            return piece.mul_(mine.view(*mine.shape, *[1] * (piece.dim() - 2)))
        return piece if first or not self.split else piece.zero_()

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
