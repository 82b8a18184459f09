"""Means of what comes in one by one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RunningMean:
    """Mean since the last `take`; adding tensors, which are 0-d, does not read the device."""

    total: Tensor | float = 0.0
    count: float = 0.0

    def add(self, total: Tensor | float, count: float = 1.0) -> None:
        """Add a value, or the sum of `count` of them."""
        self.total = self.total + total
        self.count += count

    def sums(self) -> tuple[float, float]:
        """Total and count so far; may read the device."""
        return float(self.total), self.count

    def take(self) -> float | None:
        """The mean, or None without values; may read the device, and starts anew."""
        total, count = self.sums()
        self.total = self.count = 0.0
        return total / count if count else None
