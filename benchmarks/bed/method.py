"""What a method of training domain after domain may change about a plain run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from interference_guard.integrations.trl import InterferenceGuardCallback, order_by_domain

from .beds import named
from .run import Result, Run

Rows = Mapping[str, Sequence[dict[str, str]]]


class Method:
    """The base: one trainer over one domain after the other, and nothing else.

    Args:
        run: What is run.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.bed = run, named(run.bed)
        self.seconds = 0.0
        self.callback: InterferenceGuardCallback | None = None

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.run.steps * len(self.run.order)

    def plan(self, rows: Rows) -> list[Dataset]:
        """The rows to train in their order; each data set gets a trainer of its own."""
        data = Dataset.from_list([row for name in self.run.order for row in rows[name]])
        order = {"batches": self.run.steps, "seed": self.run.seed}
        return [order_by_domain(data, self.bed.prompts, "sequential", **order)]

    def arguments(self) -> dict[str, Any]:
        """Fields of `GRPOConfig` that differ."""
        return {}

    def policy(self, student: Any, folder: Path) -> Any:
        """The model that the next trainer is given; `folder` may be written to."""
        return student

    def attach(self, trainer: Any, result: Result) -> None:
        """Change a trainer that has not begun."""

    def release(self, policy: Any) -> Any:
        """The model as it is after a trainer's end."""
        return policy

    def bytes(self) -> int:
        """What the method keeps now, beside what plain training has."""
        return 0


class Guarded(Method):
    """The guard; with ``"observed"`` it predicts and measures only, and each prediction is written down."""

    every = 3

    def attach(self, trainer: Any, result: Result) -> None:
        from interference_guard import GuardConfig

        from .watching import Pairs, Recoveries

        run = self.run
        settings = {"project": run.method != "observed", "seed": run.seed, **run.guard}
        given = None
        if run.reference is not None:
            answers = self.bed.rows(run.reference, 512, 20_000 + run.seed)
            rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in answers]
            given = {run.reference: Dataset.from_list(rows)}
        self.callback = InterferenceGuardCallback(trainer, GuardConfig(**settings), reference=given)
        trainer.add_callback(self.callback)
        if run.method == "observed" and self.every:
            trainer.add_callback(Pairs(self.callback, self.every, result))
        if self.callback.config.recovery:
            trainer.add_callback(Recoveries(self.callback, result))

    def release(self, policy: Any) -> Any:
        if self.callback is not None and self.callback.guard is not None:
            self.seconds = sum(self.callback.guard.clock.seconds.values())
        return policy

    def bytes(self) -> int:
        guard = self.callback.guard if self.callback is not None else None
        return 0 if guard is None else tensor_bytes(guard.state_dict())


class Mixed(Method):
    """All domains at once: rows drawn from all of them, or with ``strength="batches"`` a domain a step."""

    def plan(self, rows: Rows) -> list[Dataset]:
        import torch

        data = Dataset.from_list([row for name in self.run.order for row in rows[name]])
        if self.run.strength == "batches":
            weights = dict.fromkeys(self.run.order, 1.0)
            order = {"batches": self.total, "seed": self.run.seed}
            return [order_by_domain(data, self.bed.prompts, weights, **order)]
        mixture = torch.Generator().manual_seed(self.run.seed)
        count = self.total * self.bed.prompts
        return [data.select(torch.randint(len(data), (count,), generator=mixture).tolist())]


def tensor_bytes(kept: Any) -> int:
    """Bytes of all tensors in nested mappings and sequences; storage that several share counts once."""
    seen: dict[int, int] = {}

    def visit(item: Any) -> None:
        if hasattr(item, "untyped_storage"):
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = max(seen.get(storage.data_ptr(), 0), item.numel() * item.element_size())
        elif isinstance(item, Mapping):
            for value in item.values():
                visit(value)
        elif isinstance(item, list | tuple):
            for value in item:
                visit(value)

    visit(kept)
    return sum(seen.values())


METHODS: dict[str, Callable[[Run], Method]] = {
    "plain": Method,
    "guarded": Guarded,
    "observed": Guarded,
    "mixed": Mixed,
}
