"""The prediction's optional first-order term: the domain's own mean gradient along its directions.

For a domain that is not at its optimum, a small displacement changes the expected reward in the first order,
and may raise it. With the mean gradient g of the latest own steps, seen in the kept directions, the term is
sum (g U) z. The gradient itself would take the weights' size; kept is its product with the curvature's test
matrix, g Omega, from which g U follows by least squares: U lies almost in the span of Y = sum G'(G Omega).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .local_model import LocalModel
from .observation import Observation
from .shards import Spread

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard

# Own steps after which a gradient counts half in the mean: at the anchor the latest ones are wanted.
HALF_LIFE = 10.0


class GradientMean:
    """Running mean of g Omega over a domain's own steps.

    Args:
        omegas: Test matrix of each block, ``(width, sketch)`` fp32.
        sums: Decayed sums per block, ``(matrices, units, sketch)`` fp32; empty before the first step.
        count: Decayed number of steps, a 0-d tensor.
        spread: How the blocks lie on several ranks, or None. The sums are then what this rank adds to them.
    """

    decay = 0.5 ** (1 / HALF_LIFE)

    def __init__(
        self,
        omegas: Sequence[Tensor],
        sums: list[Tensor] | None = None,
        count: Tensor | None = None,
        spread: Spread | None = None,
    ) -> None:
        self.spread = spread
        self.omegas = omegas
        self.sums: list[Tensor] = [] if sums is None else sums
        self.count = torch.zeros((), device="cpu") if count is None else count

    def observe(self, gradients: Sequence[Tensor]) -> None:
        """Add one own step; one that is not finite is left out, decided on the device.

        Args:
            gradients: One ``(matrices, units, width)`` fp32 tensor a block; not changed. They are read by index,
                one at a time.
        """
        seen = [gradients[index] @ omega for index, omega in enumerate(self.omegas)]
        self._add(seen, torch.stack([item.sum() for item in seen]).sum().isfinite())

    def add(self, seen: Observation) -> None:
        """Add one own step of a model spread over ranks, after its observation was summed over them."""
        self._add(seen.products, seen.total.isfinite())

    def _add(self, seen: Sequence[Tensor], finite: Tensor) -> None:
        if not self.sums:
            self.sums = [torch.zeros_like(item) for item in seen]
            self.count = self.count.to(seen[0].device)
        keep = torch.where(finite, self.decay, 1.0)
        for mine, item in zip(self.sums, seen, strict=True):
            mine.mul_(keep).add_(torch.where(finite, item, 0.0))
        self.count = self.count * keep + finite

    def along(self, model: LocalModel) -> list[Tensor]:
        """Mean gradient of the protected units along a local model's directions, per block ``(rows, rank)``.

        Over several ranks one sum, which all call.
        """
        found = []
        sums = self.sums if self.spread is None else self.spread.whole_products(self.sums)
        for total, omega, block in zip(sums, self.omegas, model.blocks, strict=True):
            # g ~ x U', so g Omega = x (U' Omega); unused columns of U are zero and get zero.
            solved = total @ torch.linalg.pinv(block.U.mT @ omega)
            found.append(block.select(solved / self.count.clamp(min=1e-30)).contiguous())
        return found


def first_order(slopes: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
    """Sum of (g U) z, a 0-d tensor; both per block ``(rows, rank)``."""
    return torch.stack([(slope * z).sum() for slope, z in zip(slopes, views, strict=True)]).sum()


def slopes_of(guard: Guard, state: DomainState, model: LocalModel) -> list[Tensor] | None:
    """The domain's mean gradient along a local model's directions; None unless `first_order` is set."""
    if not guard.config.first_order or state.gradient is None:
        return None
    return state.gradient.along(model)
