"""Rounds of evaluation: the true rewards by domain, over all sets that one call evaluates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .seams import Seams


class EvaluationRounds:
    """Collects rewards while the trainer evaluates, and hands them over once a round.

    `Trainer.evaluate` calls itself for each of several sets. Their rewards belong together: two sets of one
    domain are not two measurements of the same number. What `predict` scores is of no round, and is left out. So
    is the round with which `eval_on_start` begins a resumed run: an uninterrupted one does not have it.

    Args:
        seams: The trainer's methods, to be wrapped.
        heard: Called at the end of a round with the mean reward by domain.
    """

    def __init__(self, seams: Seams, heard: Callable[[dict[str, float]], None]) -> None:
        self.trainer, self._heard = seams.trainer, heard
        self._resumed_at = 0
        self._rewards: dict[str, list[float]] | None = None
        seams.wrap("evaluate", self._evaluate)

    def begin(self) -> None:
        """A run begins, or goes on after the steps that the trainer has counted."""
        self._resumed_at = self.trainer.state.global_step

    @property
    def open(self) -> bool:
        """Whether the trainer is evaluating; the same on all ranks."""
        return self._rewards is not None

    def note(self, domain: str, reward: float) -> None:
        """Take the reward of one row into the round."""
        if self._rewards is not None:
            self._rewards.setdefault(domain, []).append(reward)

    def _evaluate(self, method: Any) -> Any:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            if self._rewards is not None:
                return method(*args, **kwargs)
            rewards: dict[str, list[float]] = {}
            self._rewards = rewards
            try:
                metrics = method(*args, **kwargs)
            finally:
                self._rewards = None
            if self.trainer.is_in_train and 0 < self._resumed_at == self.trainer.state.global_step:
                return metrics
            self._heard({name: sum(values) / len(values) for name, values in rewards.items()})
            return metrics

        return evaluate
