"""A guarded run beside which something else is compared with the guard, in pairs that are written down."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from transformers import TrainerCallback

from .bed import model as policy
from .bed.method import Guarded
from .bed.run import Result
from .processes import finished
from .provenance import write


class Compare(TrainerCallback):
    """The base of a callback that adds to `result.pairs`; pass rates are sampled on rows of its own.

    Args:
        method: How the run is trained; its guard must be attached.
        trainer: The trainer.
        result: Where the pairs go.
    """

    test_rows: ClassVar[int]

    def __init__(self, method: Guarded, trainer: Any, result: Result) -> None:
        self.run, self.bed, self.trainer, self.result = method.run, method.bed, trainer, result
        assert method.callback is not None
        self.guard: Any = method.callback.guard
        self.tests = {name: self.bed.rows(name, self.test_rows, 30_000, test=True) for name in self.run.order}

    def rates(self, model: Any, names: Sequence[str], seed: int = 1) -> dict[str, float]:
        """Pass rates of domains under the present weights."""
        tests, words = {name: self.tests[name] for name in names}, self.trainer.processing_class
        return policy.pass_rates(model, words, tests, seed=seed, longest=self.bed.longest)


class Compared(Guarded):
    """The guard, and the callback `compare` beside it."""

    # The pairs are the callback's.
    every = 0
    compare: type[Compare]

    def attach(self, trainer: Any, result: Result) -> None:
        super().attach(trainer, result)
        trainer.add_callback(self.compare(self, trainer, result))


def run_all(
    name: str,
    one: Callable[..., dict[str, Any]],
    jobs: Sequence[tuple[Any, ...]],
    workers: int,
    summarise: Callable[[Sequence[dict[str, Any]]], Any],
    before: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Run all, and write the results after each, as they take minutes; says on the terminal how far it is.

    Args:
        name: Of the results file.
        one: Makes one run out of a job and the folder of the shared warm starts.
        jobs: Its other arguments, by run.
        workers: Processes.
        summarise: What the file holds beside the runs.
        before: Runs that the file holds already, and keeps.

    Returns:
        All runs.
    """
    runs = list(before)
    with tempfile.TemporaryDirectory() as starts:
        for found in finished(one, [(*job, starts) for job in jobs], workers, 1):
            runs.append(found)
            runs.sort(key=lambda run: json.dumps(run["run"], sort_keys=True))
            path = write(name, {"summary": summarise(runs), "runs": runs})
            print(f"{len(runs)} of {len(before) + len(jobs)} runs, in {path}", flush=True)
    return runs
