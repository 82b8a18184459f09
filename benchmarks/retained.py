"""How well retained completions measure what a domain has lost, by how many and of how many prompts they are.

    python -m benchmarks.retained [--beds gym digits] [--seeds 0 1] [--workers 2]

Trains domain after domain with the guard and keeps each domain's last 1,024 completions. In the middle and at the
end of every later phase its loss is estimated on several choices of them, and compared with the true drop of its
pass rate, sampled on 2,048 prompts of their own then and when its phase ended. Writes
`benchmarks/results/retained.json`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from statistics import correlation, fmean
from typing import Any

import torch
from torch import Tensor

from interference_guard import Completions
from interference_guard.probe import estimate, evenly, join

from .bed.beds import BEDS
from .bed.method import Guarded
from .bed.run import Result, Run
from .comparing import Compare, Compared, run_all
from .rivals.running import result_of
from .tables import show

KEPT, TEST_ROWS = 1024, 2048
# Rows used, out of how many of the latest.
CHOICES = {
    "128 of the latest 128": (128, 128),
    "128 of the latest 256": (128, 256),
    "128 of the latest 512": (128, 512),
    "128 of the latest 1,024": (128, 1024),
    "256 of the latest 256": (256, 256),
    "512 of the latest 512": (512, 512),
}


class Measuring(Compare):
    """Writes down what each choice of completions says."""

    test_rows = TEST_ROWS

    def __init__(self, method: Guarded, trainer: Any, result: Result) -> None:
        super().__init__(method, trainer, result)
        self.batches: dict[str, list[Completions]] = {}
        # Of each domain that has ended: its completions, their scores, its pass rate.
        self.anchors: dict[str, tuple[Completions, Tensor, float]] = {}
        kept = self.guard.retain

        def retain(domain: str, completions: Completions) -> None:
            self.batches.setdefault(domain, []).append(completions.detached())
            kept(domain, completions)

        self.guard.retain = retain

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        phase, place = divmod(state.global_step, self.run.steps)
        if place in (0, self.run.steps // 2) and self.anchors:
            rates = self.rates(model, list(self.anchors), seed=2)
            for name, (rows, before, rate) in self.anchors.items():
                now, span = self.guard.policy(rows), self.guard.domains[name].span
                found = {"step": state.global_step, "domain": name, "true": rate - rates[name]}
                for choice, (count, latest) in CHOICES.items():
                    these = len(rows) - latest + evenly(latest, count)
                    mask, rewards = rows.completion_mask[these], rows.rewards
                    assert rewards is not None
                    seen = estimate(name, now[these], before[these], mask, rewards[these], span)
                    found[choice] = seen.loss
                self.result.pairs.append(found)
        if place == 0:
            name = self.run.order[phase - 1]
            rows = join(self.batches.pop(name))
            rows = rows.rows(slice(len(rows) - KEPT, len(rows)))
            self.anchors[name] = rows, self.guard.policy(rows), self.rates(model, [name], seed=1)[name]


class Measured(Compared):
    """The guard, and beside it everything that its probe might have been made of."""

    compare = Measuring


def one(bed: str, seed: int, starts: str) -> dict[str, Any]:
    """One run in a process of its own, in the second order."""
    where = BEDS[bed]
    run = Run("guard", where.rate, seed, where.orders[1], where.steps, bed=bed)
    return result_of(run, Measured(run), starts, pairs=True)


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By bed and choice: mean error, root mean square error and correlation with the true drop."""
    rows = []
    for bed in sorted({run["run"]["bed"] for run in runs}):
        pairs = [pair for run in runs if run["run"]["bed"] == bed for pair in run["pairs"]]
        true = [pair["true"] for pair in pairs]
        for choice in CHOICES:
            errors = [pair[choice] - pair["true"] for pair in pairs]
            rows.append(
                {
                    "bed": bed,
                    "choice": choice,
                    "pairs": len(pairs),
                    "true": fmean(true),
                    "bias": fmean(errors),
                    "rmse": math.sqrt(fmean(error**2 for error in errors)),
                    "correlation": correlation([pair[choice] for pair in pairs], true),
                }
            )
    return rows


HEAD = ("bed", "completions", "mean error", "root mean square error", "correlation")


def cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of the table of `summarise`, under `HEAD`."""
    return [
        (row["bed"], row["choice"], f"{row['bias']:+.3f}", f"{row['rmse']:.3f}", f"{row['correlation']:.2f}")
        for row in rows
    ]


def main() -> None:
    """Run all and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--beds", nargs="+", choices=sorted(BEDS), default=sorted(BEDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs = [(bed, seed) for bed in options.beds for seed in options.seeds]
    runs = run_all("retained", one, jobs, options.workers, summarise)
    show("Estimates of a loss against the true one", HEAD, cells(summarise(runs)))


if __name__ == "__main__":
    main()
