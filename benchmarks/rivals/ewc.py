"""Elastic weight consolidation (Kirkpatrick et al., 2017): one quadratic penalty for each earlier domain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interference_guard.integrations.trl.seams import Seams

from ..bed.method import tensor_bytes
from ..bed.run import Result
from .phased import Phased, Rollouts

ROWS = 128


class EWC(Phased):
    """`strength` is lambda: the loss gains ``lambda / 2 * sum F (w - w*)^2`` for every earlier domain.

    F is the diagonal of the Fisher matrix of a domain's last rollouts, the mean over completions of the squared
    gradient of their log-probability, over its own mean: the Fisher matrix of a mastered domain is a hundred
    times smaller, and no one lambda would serve both (Schwarz et al., 2018, normalise it too).
    """

    def attach(self, trainer: Any, result: Result) -> None:
        super().attach(trainer, result)
        self.rollouts = Rollouts(trainer)
        self.anchors: list[dict[str, tuple[Tensor, Tensor]]] = []
        Seams(trainer).wrap("compute_loss", self._penalised)

    def _penalised(self, method: Any) -> Any:
        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs) + self.penalty()

        return compute_loss

    def penalty(self) -> Tensor:
        """What the loss gains under the present weights."""
        parameters = dict(self.model.named_parameters())
        total = torch.zeros(())
        for anchor in self.anchors:
            for name, (weights, fisher) in anchor.items():
                total = total + (fisher * (parameters[name] - weights).square()).sum()
        return 0.5 * float(self.run.strength) * total

    def end(self, phase: int) -> None:
        rows = self.rollouts.latest
        kept = {name: p.grad for name, p in self.model.named_parameters()}
        fisher = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        count = min(ROWS, len(rows["completion_ids"]))
        for index in range(count):
            one = {name: value[index : index + 1] for name, value in rows.items()}
            self.model.zero_grad(set_to_none=True)
            self.rollouts.log_probabilities(one).sum().backward()
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    fisher[name] += parameter.grad.square() / count
        scale = sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
        for value in fisher.values():
            value.div_(scale.clamp(min=1e-20))
        self.anchors.append(
            {name: (p.detach().clone(), fisher[name]) for name, p in self.model.named_parameters()}
        )
        for name, parameter in self.model.named_parameters():
            parameter.grad = kept[name]

    def bytes(self) -> int:
        return tensor_bytes([list(anchor.values()) for anchor in self.anchors])
