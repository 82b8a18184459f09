"""Reductions over data-parallel ranks, after which every rank measures and decides the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor, str], Tensor]
"""Reduces a 1-d tensor over ranks: ``reduce(tensor, "sum" | "max")``."""


class Ranks:
    """Sums and limits over ranks; in a single process what was given is returned.

    Args:
        reduce: The host's reduction, or None in a single process.
    """

    def __init__(self, reduce: Reduce | None = None) -> None:
        self.reduce = reduce

    def sum(self, table: Tensor) -> Tensor:
        """Sum of a 1-d tensor."""
        return table if self.reduce is None else self.reduce(table, "sum")

    def largest(self, values: list[float], device: torch.device) -> list[float]:
        """Largest of each of several plain numbers."""
        if self.reduce is None:
            return values
        found = self.reduce(torch.tensor(values, dtype=torch.float64, device=device), "max")
        return [float(value) for value in found.tolist()]

    def totals(self, values: list[float], device: torch.device) -> list[float]:
        """Sums of plain numbers."""
        if self.reduce is None:
            return values
        summed = self.reduce(torch.tensor(values, dtype=torch.float64, device=device), "sum")
        return [float(value) for value in summed.tolist()]

    def any(self, found: bool, device: torch.device) -> bool:
        """Whether it was found on any rank."""
        return self.limits(0.0, float(found), device)[1] > 0

    def limits(self, low: float, high: float, device: torch.device) -> tuple[float, float]:
        """Smallest low and largest high; a rank that has none gives ``inf, -inf``."""
        negative, highest = self.largest([-low, high], device)
        return -negative, highest
