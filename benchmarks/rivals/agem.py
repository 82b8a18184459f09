"""A-GEM (Chaudhry et al., 2019): gradients that would raise the loss on remembered rollouts are turned away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bed.method import tensor_bytes
from ..bed.run import Result
from .phased import Phased, Rollouts


class AGEM(Phased):
    """`strength` is the number of remembered rollouts that the reference gradient of a step is taken on.

    Remembered are rewarded rollouts of every earlier domain's last steps. The loss on them is their mean negative
    log-probability: advantages of a domain that has been mastered are 0, and would remember nothing. Where a
    gradient has a negative product with the gradient of that loss, that part is removed.
    """

    def attach(self, trainer: Any, result: Result) -> None:
        super().attach(trainer, result)
        self.rollouts = Rollouts(trainer)
        self.memory: list[dict[str, Tensor]] = []
        self.generator = torch.Generator().manual_seed(self.run.seed)

    def end(self, phase: int) -> None:
        rows = self.rollouts.latest
        right = rows["rewards"] > 0
        self.memory.append({name: value[right].clone() for name, value in rows.items()})

    def before_step(self) -> None:
        filled = [rows for rows in self.memory if len(rows["rewards"])]
        if not filled:
            return
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        own = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        each = max(int(self.run.strength) // len(filled), 1)
        for rows in filled:
            chosen = torch.randperm(len(rows["rewards"]), generator=self.generator)[:each]
            part = {name: value[chosen] for name, value in rows.items()}
            (-self.rollouts.log_probabilities(part).mean() / len(filled)).backward()
        # A parameter that the remembered rollouts do not reach has nothing to be turned away from.
        reference = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for gradient, turned in zip(own, turn(own, reference), strict=True):
            gradient.copy_(turned)
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad = gradient

    def bytes(self) -> int:
        return tensor_bytes(self.memory)


def turn(own: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
    """The gradients nearest to `own` whose product with `reference` is not negative."""
    product = sum((g * r).sum() for g, r in zip(own, reference, strict=True))
    length = sum(r.square().sum() for r in reference)
    if product >= 0 or length <= 0:
        return own
    return [g - r * (product / length) for g, r in zip(own, reference, strict=True)]
