"""The local model of one block, and how its coordinates meet the weights on this rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .regions import Region


class Correction(NamedTuple):
    """A change of one block, ``coefficients @ directions'``, which is never made whole for a large one.

    Args:
        coefficients: ``(matrices, units, k)`` fp32, of the units that lie on this rank.
        directions: ``(matrices, width, k)`` fp32, as far as the units' width lies on this rank.
    """

    coefficients: Tensor
    directions: Tensor

    def dense(self) -> Tensor:
        """The change, ``(matrices, units, width)`` fp32."""
        return self.coefficients @ self.directions.mT


@dataclass
class LocalBlock:
    """The local model of one block.

    Args:
        U: Directions, ``(matrices, width, rank)`` fp32; unused columns are zero.
        lam: Their eigenvalues, ``(matrices, rank)`` fp32.
        rho: Mean eigenvalue of the missed directions, ``(matrices,)`` fp32.
        scale: c, ``(matrices,)`` fp32.
        energy: e, ``(matrices, units)`` fp32; the curvature's own tensor until `LocalModel.keep_energy`.
        rows: Protected units as indices into the flattened ``(matrices * units,)``, or None for all.
        z0: Anchor coordinates of the protected units, ``(rows, rank)`` fp32.
        q0: Anchor seen through R, ``(rows, residual)`` fp32.
        region: What of the block lies on this rank, None where all does. Only `z0` and `q0` are then of the
            units here, and of their width here.
    """

    U: Tensor
    lam: Tensor
    rho: Tensor
    scale: Tensor
    energy: Tensor
    rows: Tensor | None
    z0: Tensor
    q0: Tensor
    region: Region | None = None

    @property
    def width(self) -> int:
        """Length of a unit."""
        return self.U.shape[1]

    @property
    def rank(self) -> int:
        """Columns of U."""
        return self.U.shape[2]

    def unit_scale(self) -> Tensor:
        """Scale c e_j of each protected unit, ``(rows,)``."""
        return self.protected(self.energy * self.scale.unsqueeze(-1))

    def _by_unit(self, values: Tensor) -> Tensor:
        """Per-matrix values ``(matrices, ...)`` repeated for each protected unit, ``(rows, ...)``."""
        units = self.energy.shape[1]
        if self.rows is None:
            expanded = values.unsqueeze(1).expand(-1, units, *values.shape[1:])
            return expanded.reshape(-1, *values.shape[1:])
        return values[self.rows // units]

    def weights(self) -> Tensor:
        """Weights w of every coordinate, ``(rows, rank)``."""
        if self.rows is None:
            scaled = self.energy * self.scale.unsqueeze(-1)
            return (scaled.unsqueeze(-1) * self.lam.unsqueeze(1)).view(-1, self.rank)
        return self.unit_scale().unsqueeze(-1) * self._by_unit(self.lam)

    def protected(self, values: Tensor) -> Tensor:
        """Values of the protected units, ``(rows,)``, out of ``(matrices, units)``."""
        return values.flatten() if self.rows is None else values.flatten()[self.rows]

    def select(self, values: Tensor) -> Tensor:
        """Protected rows of ``(matrices, units, columns)``, as ``(rows, columns)``."""
        flat = values.reshape(-1, values.shape[-1])
        return flat if self.rows is None else flat[self.rows]

    @cached_property
    def _here(self) -> tuple[Tensor, Tensor]:
        assert self.region is not None
        assert self.rows is not None
        return self.region.rows(self.rows)

    def take(self, values: Tensor) -> Tensor:
        """Protected rows of this rank's ``(matrices, units, columns)``."""
        if self.region is None or self.rows is None:
            return self.select(values)
        return values.reshape(-1, values.shape[-1])[self._here[1]]

    def put(self, values: Tensor, out: Tensor) -> None:
        """What this rank adds to the sum over ranks ``(rows, columns)``: inverse of `take`, into zeros."""
        region = self.region
        if region is None:
            out.copy_(values)
        elif not region.owner:
            return
        elif self.rows is None:
            columns = out.shape[-1]
            whole = region.units(out.view(*region.shape[:2], columns))
            whole.copy_(values.view(whole.shape))
        else:
            out.index_copy_(0, self._here[0], values)

    @property
    def count(self) -> int:
        """Protected units on all ranks."""
        return self.energy.numel() if self.rows is None else len(self.rows)

    def directions(self) -> Tensor:
        """U, as far as it meets the units' width on this rank."""
        return self.U if self.region is None else self.region.across(self.U)

    def correction(self, values: Tensor, U: Tensor) -> Correction:
        """Coefficients ``(matrices, units, k)`` of directions ``(matrices, width, k)``, for what lies here."""
        return Correction(values if self.region is None else self.region.units(values), U)

    def scatter(self, values: Tensor) -> Tensor:
        """Inverse of `select`: ``(rows, columns)`` into zeros of ``(matrices, units, columns)``."""
        matrices, units = self.energy.shape
        if self.rows is None:
            return values.view(matrices, units, -1)
        full = values.new_zeros(matrices * units, values.shape[-1])
        return full.index_copy_(0, self.rows, values).view(matrices, units, -1)

    def residual(self, z: Tensor, q: Tensor, R: Tensor) -> Tensor:
        """Sum of w_res |r|^2 / 2, the part of the prediction outside the kept directions (0-d)."""
        mixed = self.U.mT @ R
        if self.rows is None:
            matrices = self.energy.shape[0]
            r = torch.baddbmm(
                q.view(matrices, -1, q.shape[-1]), z.view(matrices, -1, self.rank), mixed, alpha=-1
            ).view_as(q)
        else:
            r = q - torch.bmm(z.unsqueeze(1), self._by_unit(mixed)).squeeze(1)
        return torch.dot(r.square().sum(-1), self.unit_scale() * self._by_unit(self.rho)) / 2
