"""One parameter's share of a domain's local model, and a displacement as that sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from interference_guard.local_block import LocalBlock
from interference_guard.units import UnitView

from .checkpoints import Weights
from .pieces import matrix_shape, unit_pieces

# Rows `first` to `last` of a tensor, fp32.
Read = Callable[[int, int], Tensor]


def displacement(name: str, after: Weights, *, before: Weights | None = None) -> Read:
    """Read what a tensor moved by, or the tensor itself where nothing says from where.

    Args:
        name: Its name in both.
        after: Weights after the displacement.
        before: Weights before it, or None.
    """

    def read(first: int, last: int) -> Tensor:
        found = after.rows(name, first, last)
        return found if before is None else found.sub_(before.rows(name, first, last))

    return read


@dataclass
class Seen:
    """A tensor seen through a local model.

    Args:
        z: Along the directions, ``(matrices, units, rank)`` fp32.
        r: Through the residual's random directions, the part along U taken out,
            ``(matrices, units, columns)`` fp32.
        lengths: Squared length of each unit, ``(units,)`` fp64.
    """

    z: Tensor
    r: Tensor
    lengths: Tensor


@dataclass
class Part:
    """One parameter's share of a domain's local model.

    Args:
        view: The parameter's unit view.
        block: Its local model; `matrices` is 1, or the number of experts of a stack.
        R: Random directions of the residual, ``(matrices, width, columns)`` fp32.
    """

    view: UnitView
    block: LocalBlock
    R: Tensor

    def scatter(self, values: Tensor) -> Tensor:
        """Per protected unit ``(rows,)`` to ``(units,)`` of the whole parameter, zero elsewhere."""
        return self.block.scatter(values.unsqueeze(-1)).flatten()

    def see(self, read: Read, *, anchored: bool = False) -> Seen:
        """Read a tensor piece by piece, and keep what the local model sees of it.

        Args:
            read: Gives its rows.
            anchored: Whether it holds weights whose displacement from the anchor is meant. What is said of units
                that are not protected, and so have no anchor, is then of the weights themselves.
        """
        block = self.block
        rank, residual = block.rank, self.R.shape[-1]
        shape = matrix_shape(self.view)
        products = torch.zeros(*shape, rank + residual, device="cpu")
        lengths = torch.zeros(shape, dtype=torch.float64, device="cpu")
        for piece in unit_pieces(self.view):
            rows = piece.view(read(piece.first, piece.last))
            U, R = block.U[piece.matrices, piece.width], self.R[piece.matrices, piece.width]
            # Added, because a piece may hold a part of every unit's width.
            piece.part(products).add_(rows @ torch.cat((U, R), -1))
            piece.part(lengths).add_(rows.square().sum(-1, dtype=torch.float64))
        z, q = torch.split(products, [rank, residual], -1)
        if anchored:
            z, q = z - block.scatter(block.z0), q - block.scatter(block.q0)
        return Seen(z, torch.baddbmm(q, z, block.U.mT @ self.R, alpha=-1), lengths.flatten())

    def interference(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Raw predicted interference of each unit, inside and outside the directions, ``(units,)`` each."""
        block = self.block
        z, r = block.select(seen.z), block.select(seen.r)
        inside = (block.weights() * z.square()).sum(-1) / 2
        rho = block.rho.repeat_interleave(block.energy.shape[1])
        outside = block.unit_scale() * block.protected(rho) * r.square().sum(-1) / 2
        return self.scatter(inside), self.scatter(outside)
