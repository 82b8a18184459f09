"""Row ranges of a saved tensor in unit view, so that a large one is read and written piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from interference_guard.units import UnitView

from .checkpoints import pieces


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor's first axis, and where they lie in its ``(matrices, units, width)`` view.

    Args:
        kind: The unit view's kind.
        first: The first row.
        last: The row after the last.
        matrices: Which experts of a stack; all but for stacks.
        units: Which units of each matrix.
        width: Which elements of each unit. Rows of a matrix with one unit a column hold a part of every unit.
    """

    kind: str
    first: int
    last: int
    matrices: slice
    units: slice
    width: slice

    def view(self, rows: Tensor) -> Tensor:
        """The piece's rows as ``(matrices, units, width)``; writing to the result writes to contiguous `rows`."""
        if self.kind == "vector":
            return rows.reshape(1, 1, -1)
        if self.kind == "column":
            rows = rows.mT
        if rows.dim() == 3 and self.units == slice(None):
            return rows
        return rows.reshape(1, -1, rows.shape[-1]) if self.kind == "row" else rows.unsqueeze(0)

    def part(self, values: Tensor) -> Tensor:
        """The units of this piece, out of ``(matrices, units, ...)``; a view."""
        return values[self.matrices, self.units]


def unit_pieces(view: UnitView) -> Iterator[Piece]:
    """The pieces of a parameter, in the order in which they are stored."""
    for first, last in pieces(view.shape):
        yield unit_piece(view, first, last)


def unit_piece(view: UnitView, first: int, last: int) -> Piece:
    """Rows `first` to `last` of a parameter."""
    every = slice(None)
    rows = view.shape[0] if view.shape else 1
    if view.kind == "vector":
        each = view.width // rows
        return Piece(view.kind, first, last, every, every, slice(first * each, last * each))
    if view.stacked:
        return Piece(view.kind, first, last, slice(first, last), every, every)
    if view.kind == "column":
        return Piece(view.kind, first, last, every, every, slice(first, last))
    each = view.units // rows
    return Piece(view.kind, first, last, every, slice(first * each, last * each), every)


def matrix_shape(view: UnitView) -> tuple[int, int]:
    """Matrices and units of one matrix: of a stack the number of experts and the units of one."""
    matrices = view.shape[0] if view.stacked and view.kind != "vector" else 1
    return matrices, view.units // matrices
