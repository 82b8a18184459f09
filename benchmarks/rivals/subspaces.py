"""Updates confined to a part of each weight's space: away from its leading directions, or at random."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..bed.method import tensor_bytes
from .phased import Phased


class _Confined(Phased, ABC):
    """After every step, each matrix's displacement since the phase began is projected: ``L D R``.

    The first phase is free: there is no earlier domain yet.
    """

    sides: ClassVar[dict[str, tuple[Tensor | None, Tensor | None]]] = {}

    def begin(self, phase: int) -> None:
        if not phase:
            return
        self.phase = phase
        self.starts = {name: weight.clone() for name, weight in self.matrices()}
        generator = torch.Generator().manual_seed(1000 * self.run.seed + phase)
        self.sides = {name: self.projections(weight, generator) for name, weight in self.matrices()}

    @abstractmethod
    def projections(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """The symmetric projections for the left and the right side; None leaves a side free."""

    def after_step(self) -> None:
        for name, weight in self.matrices() if self.sides else ():
            left, right = self.sides[name]
            moved = weight - self.starts[name]
            if left is not None:
                moved = left @ moved
            if right is not None:
                moved = moved @ right
            weight.copy_(self.starts[name] + moved)

    def bytes(self) -> int:
        return tensor_bytes([self.starts, list(self.sides.values())]) if self.sides else 0


class OSFTLike(_Confined):
    """Updates stay out of the leading singular directions of the weights that a phase begins with.

    `strength` is ``"side share"``: ``right``, ``left`` or ``both``, and the share of directions kept from change,
    or ``progressive`` for the share of domains that are trained. After orthogonal subspace fine-tuning (Nayak et
    al., 2025), which keeps both sides, as a projection of realised weights.
    """

    def projections(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        side, share = str(self.run.strength).split()
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        part = self.phase / len(self.run.order) if share == "progressive" else float(share)
        count = round(part * min(weight.shape))

        def away(leading: Tensor) -> Tensor:
            return torch.eye(len(leading)) - leading @ leading.T

        return (
            away(left[:, :count]) if side in ("left", "both") else None,
            away(right[:count].T) if side in ("right", "both") else None,
        )


class RandomSubspace(_Confined):
    """Updates stay in random directions of the width, drawn anew for every phase; `strength` is their share."""

    def projections(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        width = weight.shape[1]
        count = max(round(float(self.run.strength) * width), 1)
        directions = torch.linalg.qr(torch.randn(width, count, generator=generator)).Q
        return None, directions @ directions.T
