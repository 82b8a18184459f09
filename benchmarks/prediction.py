"""How well a domain's loss is foretold: by the guard, by its measurements, and by cheaper means.

    python -m benchmarks.prediction [--bed digits] [--seeds 0 1 2] [--workers 2] [--guarded]

Trains domain after domain and compares, every few steps and for every earlier domain, each predictor with the
true drop of the pass rate on fresh rollouts. Plain training is predicted by default; with `--guarded` the
projection acts on it. Writes `benchmarks/results/prediction_<bed>[_guarded].json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from .ablations import RATE
from .bed import model as policy
from .bed.beds import BEDS
from .bed.method import Guarded
from .bed.run import Result, Run
from .forgetting import spearman
from .provenance import write
from .rivals.phased import Rollouts
from .rivals.running import result_of

EVERY, TEST_ROWS, FISHER_ROWS = 10, 512, 128
PREDICTORS = {
    "predicted": "the guard's calibrated prediction",
    "quadratic": "its quadratic term, uncalibrated",
    "measured": "the guard's measurement on retained completions",
    "kl": "KL from the anchor on the same completions",
    "distance": "squared distance of the weights from the anchor",
    "fisher": "diagonal Fisher of 128 own rollouts at the anchor",
    "gradient": "displacement along the policy gradient at the anchor",
    "cosine": "cosine of the step's gradient and that one, negated",
    "kl_new": "KL on the new task since its phase began",
}


class Predicting(Guarded):
    """The guard, and every other predictor beside it."""

    # The pairs are written here, with more in them.
    every = 0

    def attach(self, trainer: Any, result: Result) -> None:
        super().attach(trainer, result)
        trainer.add_callback(_Compare(self, trainer, result))


class _Compare(TrainerCallback):
    def __init__(self, method: Guarded, trainer: Any, result: Result) -> None:
        self.run, self.trainer, self.result = method.run, trainer, result
        assert method.callback is not None
        assert method.callback.guard is not None
        self.guard, self.rollouts = method.callback.guard, Rollouts(trainer)
        rows = method.bed.rows
        self.tests = {name: rows(name, TEST_ROWS, 30_000) for name in self.run.order}
        self.longest = method.bed.longest
        # Of each domain that has ended: weights, gradient, Fisher diagonal, pass rate.
        self.anchors: dict[str, tuple[Tensor, Tensor, Tensor, float]] = {}
        self.gradient = torch.zeros(0)
        self.start: tuple[dict[str, Tensor], Tensor] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        self.gradient = _flat(p.grad for p in model.parameters())
        if state.global_step % self.run.steps == 0:
            with torch.no_grad():
                self.start = dict(self.rollouts.latest), self.rollouts.log_probabilities(self.rollouts.latest)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        phase, place = divmod(state.global_step, self.run.steps)
        if place % EVERY == 0 and self.guard.protected:
            self._compare(state.global_step, model)
        if place == 0:
            self._anchor(self.run.order[phase - 1], model)

    def _rates(self, model: Any, names: Sequence[str]) -> dict[str, float]:
        tests = {name: self.tests[name] for name in names}
        words = self.trainer.processing_class
        return policy.pass_rates(model, words, tests, seed=1, longest=self.longest)

    def _anchor(self, name: str, model: Any) -> None:
        rows = self.rollouts.latest
        kept = [p.grad for p in model.parameters()]
        total = torch.zeros_like(self.gradient)
        fisher = torch.zeros_like(self.gradient)
        count = min(FISHER_ROWS, len(rows["advantages"]))
        for index in range(count):
            model.zero_grad(set_to_none=True)
            one = {key: value[index : index + 1] for key, value in rows.items()}
            self.rollouts.log_probabilities(one).sum().backward()
            found = _flat(p.grad for p in model.parameters())
            fisher += found.square() / count
            # The gradient of the loss of reward: minus that of the expected reward.
            total -= found * rows["advantages"][index] / count
        for parameter, gradient in zip(model.parameters(), kept, strict=True):
            parameter.grad = gradient
        weights = _flat(p.detach() for p in model.parameters())
        self.anchors[name] = weights, total, fisher, self._rates(model, [name])[name]

    @torch.no_grad()
    def _compare(self, step: int, model: Any) -> None:
        from interference_guard.measuring import look

        names = self.guard.protected
        rates, weights = self._rates(model, names), _flat(p.detach() for p in model.parameters())
        assert self.start is not None
        rows, before = self.start
        tokens = rows["completion_mask"].sum()
        kl_new = float((before - self.rollouts.log_probabilities(rows)).sum() / tokens)
        for name, raw in self.guard.interference(names).items():
            state = self.guard.domains[name]
            anchor, gradient, fisher, rate = self.anchors[name]
            moved, found = weights - anchor, look(self.guard, state)
            cosine = torch.nn.functional.cosine_similarity(self.gradient, gradient, dim=0)
            self.result.pairs.append(
                {
                    "step": step,
                    "domain": name,
                    "anchor_rate": rate,
                    "true": rate - rates[name],
                    "inside": raw.inside,
                    "outside": raw.outside,
                    "predicted": self.guard.predicted(name),
                    "quadratic": raw.quadratic,
                    "measured": found.loss,
                    "kl": found.kl,
                    "distance": float(moved.square().sum()),
                    "fisher": float((fisher * moved.square()).sum()),
                    "gradient": float(gradient @ moved),
                    "cosine": -float(cosine),
                    "kl_new": kl_new,
                }
            )


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def one(bed: str, seed: int, order: int, guarded: bool, starts: str) -> dict[str, Any]:
    """One run in a process of its own."""
    where = BEDS[bed]
    method = "guard" if guarded else "observed"
    run = Run(method, RATE[bed], seed, where.orders[order], where.steps, {"retain": 256}, bed=bed)
    return result_of(run, Predicting(run), starts, pairs=True)


def trajectories(runs: Sequence[dict[str, Any]], first: bool) -> list[tuple[str, list[dict[str, Any]]]]:
    """The pairs of each domain of each run; of its first foreign phase alone with `first`."""
    found = []
    for run in runs:
        steps = run["run"]["steps"]
        for place, name in enumerate(run["run"]["order"][:-1]):
            end = (place + 2) * steps if first else float("inf")
            found.append((name, [p for p in run["pairs"] if p["domain"] == name and p["step"] <= end]))
    return found


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """A 95 % interval of the mean, by resampling."""
    chance = random.Random(0)
    means = sorted(fmean(chance.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlations with the true drop, the size of the errors, and where they are large."""
    summary: dict[str, Any] = {"rank_correlation": {}, "errors": {}}
    for span, first in (("first_phase", True), ("whole_run", False)):
        table: dict[str, Any] = {}
        for predictor in PREDICTORS:
            by: dict[str, list[float]] = {}
            for name, pairs in trajectories(runs, first):
                # NaN before the first measurement; a drop that never changes has no ranks.
                kept = [p for p in pairs if p[predictor] == p[predictor]]
                if len(kept) > 2 and len({p["true"] for p in kept}) > 1:
                    guesses = [p[predictor] for p in kept]
                    # One guess for all of them ranks nothing.
                    value = spearman(guesses, [p["true"] for p in kept]) if len(set(guesses)) > 1 else 0.0
                    by.setdefault(name, []).append(value)
            every = [value for values in by.values() for value in values]
            if every:
                means = {name: fmean(values) for name, values in by.items()}
                table[predictor] = {"mean": fmean(every), "interval": interval(every), "by_domain": means}
        summary["rank_correlation"][span] = table
    pairs = [p for run in runs for p in run["pairs"] if p["predicted"] == p["predicted"]]
    groups: dict[str, Callable[[dict[str, Any]], bool]] = {
        "all": lambda p: True,
        "true drop under .05": lambda p: p["true"] < 0.05,
        "true drop over .2": lambda p: p["true"] > 0.2,
        "mastered, .95 at the anchor": lambda p: p["anchor_rate"] >= 0.95,
        "outside the directions leads": lambda p: p["outside"] > p["inside"],
    }
    for group, chosen in groups.items():
        kept = [p for p in pairs if chosen(p)]
        if kept:
            summary["errors"][group] = {
                "pairs": len(kept),
                "true": fmean(p["true"] for p in kept),
                **{name: fmean(p[name] for p in kept) for name in ("predicted", "measured")},
                **{
                    f"{name}_error": fmean(abs(p[name] - p["true"]) for p in kept)
                    for name in ("predicted", "measured")
                },
            }
    return summary


def show(summary: dict[str, Any]) -> None:
    """Print both tables."""
    from rich.console import Console
    from rich.table import Table

    table = Table("predictor", "first foreign phase", "whole run", title="Rank correlation with the true drop")
    for name, about in PREDICTORS.items():
        cells = []
        for span in ("first_phase", "whole_run"):
            found = summary["rank_correlation"][span].get(name)
            cells.append(
                f"{found['mean']:.2f} [{found['interval'][0]:.2f}, {found['interval'][1]:.2f}]" if found else ""
            )
        table.add_row(about, *cells)
    errors = Table("pairs where", "count", "true", "predicted", "measured", "error", "error", title="Mean drop")
    for group, found in summary["errors"].items():
        keys = ("true", "predicted", "measured", "predicted_error", "measured_error")
        errors.add_row(group, str(found["pairs"]), *(f"{found[key]:.3f}" for key in keys))
    console = Console()
    console.print(table)
    console.print(errors)


def main() -> None:
    """Run all and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bed", choices=sorted(BEDS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--guarded", action="store_true", help="predict guarded training")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    name = f"prediction_{options.bed}{'_guarded' if options.guarded else ''}"
    jobs = [(options.bed, seed, order, options.guarded) for seed in options.seeds for order in options.orders]
    runs: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as starts,
        ProcessPoolExecutor(options.workers, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        for done in as_completed([pool.submit(one, *job, starts) for job in jobs]):
            runs.append(done.result())
            runs.sort(key=lambda run: json.dumps(run["run"], sort_keys=True))
            path = write(name, {"summary": summarise(runs), "runs": runs})
            print(f"{len(runs)} of {len(jobs)} runs", flush=True)
    show(summarise(runs))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
