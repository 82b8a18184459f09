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

    Remembered are the latest rollouts of every earlier domain with their advantages; where a gradient has a
    negative product with the policy gradient on them, that part is removed.
    """

    def attach(self, trainer: Any, result: Result) -> None:
        super().attach(trainer, result)
        self.rollouts = Rollouts(trainer)
        self.memory: list[dict[str, Tensor]] = []
        self.generator = torch.Generator().manual_seed(self.run.seed)

    def end(self, phase: int) -> None:
        self.memory.append({name: value.clone() for name, value in self.rollouts.latest.items()})

    def before_step(self) -> None:
        if not self.memory:
            return
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        own = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        each = max(int(self.run.strength) // len(self.memory), 1)
        for rows in self.memory:
            chosen = torch.randperm(len(rows["advantages"]), generator=self.generator)[:each]
            part = {name: value[chosen] for name, value in rows.items()}
            scores = self.rollouts.log_probabilities(part)
            (-(part["advantages"] * scores).mean() / len(self.memory)).backward()
        # A parameter that the remembered rollouts do not reach has nothing to be turned away from.
        reference = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        product = sum((g * r).sum() for g, r in zip(own, reference, strict=True))
        length = sum(r.square().sum() for r in reference)
        for parameter, gradient, other in zip(parameters, own, reference, strict=True):
            parameter.grad = gradient
            if product < 0 and length > 0:
                gradient.sub_(other * (product / length))

    def bytes(self) -> int:
        return tensor_bytes(self.memory)
