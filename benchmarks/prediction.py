"""How well a domain's loss is foretold: by the guard, by its measurements, and by cheaper means.

    python -m benchmarks.prediction [--bed digits] [--seeds 0 1 2] [--workers 2] [--guarded]

Trains domain after domain and compares, every few steps and for every earlier domain, each predictor with the
true drop of the pass rate on fresh rollouts. Plain training is predicted by default; with `--guarded` the
projection acts on it. Writes `benchmarks/results/prediction_<bed>[_guarded].json`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .bed.beds import BEDS
from .bed.method import Guarded
from .bed.run import Result, Run
from .comparing import Compare, Compared, run_all
from .forgetting import spearman
from .rivals.phased import Rollouts
from .rivals.running import result_of
from .tables import show

# Half-way between the guard's own measurements, which calibrate the prediction at the weights they are made at.
EVERY, PLACE = 20, 10
TEST_ROWS, FISHER_ROWS = 512, 128
SPANS = ("first_phase", "whole_run", "over_domains")
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
    "steps": "steps since the anchor",
}


class Predicting(Compare):
    """Writes down what every predictor says."""

    test_rows = TEST_ROWS

    def __init__(self, method: Guarded, trainer: Any, result: Result) -> None:
        super().__init__(method, trainer, result)
        self.rollouts = Rollouts(trainer)
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
        if place % EVERY == PLACE and self.guard.protected:
            self._compare(state.global_step, model)
        if place == 0:
            self._anchor(self.run.order[phase - 1], model)

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
        self.anchors[name] = weights, total, fisher, self.rates(model, [name])[name]

    @torch.no_grad()
    def _compare(self, step: int, model: Any) -> None:
        from interference_guard.measuring import look

        names = self.guard.protected
        rates, weights = self.rates(model, names), _flat(p.detach() for p in model.parameters())
        assert self.start is not None
        rows, before = self.start
        tokens = rows["completion_mask"].sum()
        kl_new = float((before - self.rollouts.log_probabilities(rows)).sum() / tokens)
        for name, raw in self.guard.raw_parts(names).items():
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
                    "steps": state.foreign_steps,
                }
            )


class Predicted(Compared):
    """The guard, and every other predictor beside it."""

    compare = Predicting


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def one(bed: str, seed: int, order: int, guarded: bool, starts: str) -> dict[str, Any]:
    """One run in a process of its own."""
    where = BEDS[bed]
    method = "guard" if guarded else "observed"
    run = Run(method, where.rate, seed, where.orders[order], where.steps, bed=bed)
    return result_of(run, Predicted(run), starts, pairs=True)


def groups(run: dict[str, Any], span: str) -> list[list[dict[str, Any]]]:
    """Pairs that are ranked among themselves.

    A domain's over its first foreign phase or over the whole run, or those of all domains at one step: what has
    to be known to say who is in danger.
    """
    order, steps = run["run"]["order"], run["run"]["steps"]
    if span == "over_domains":
        return [
            [p for p in run["pairs"] if p["step"] == step] for step in sorted({p["step"] for p in run["pairs"]})
        ]
    last = {name: (place + 2) * steps if span == "first_phase" else math.inf for place, name in enumerate(order)}
    return [[p for p in run["pairs"] if p["domain"] == name and p["step"] <= last[name]] for name in order[:-1]]


def correlation(run: dict[str, Any], span: str, predictor: str) -> float | None:
    """Mean rank correlation of a predictor with the true drop over the groups of one run."""
    found = []
    for group in groups(run, span):
        # NaN before the first measurement; a drop that never changes has no ranks.
        kept = [p for p in group if not math.isnan(p[predictor])]
        if len(kept) > 2 and len({p["true"] for p in kept}) > 1:
            guesses = [p[predictor] for p in kept]
            # One guess for all of them ranks nothing.
            found.append(spearman(guesses, [p["true"] for p in kept]) if len(set(guesses)) > 1 else 0.0)
    return fmean(found) if found else None


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlations with the true drop, run by run, the size of the errors, and where they are large."""
    summary: dict[str, Any] = {"rank_correlation": {}, "errors": {}}
    for span in SPANS:
        table = {}
        for predictor in PREDICTORS:
            values = [v for run in runs if (v := correlation(run, span, predictor)) is not None]
            if values:
                table[predictor] = {"mean": fmean(values), "by_run": values}
        summary["rank_correlation"][span] = table
    pairs = [p for run in runs for p in run["pairs"] if not math.isnan(p["predicted"])]
    places: dict[str, Callable[[dict[str, Any]], bool]] = {
        "all": lambda p: True,
        "predicted under .05": lambda p: p["predicted"] < 0.05,
        "predicted .05 to .2": lambda p: 0.05 <= p["predicted"] <= 0.2,
        "predicted over .2": lambda p: p["predicted"] > 0.2,
        "mastered, .95 at the anchor": lambda p: p["anchor_rate"] >= 0.95,
        "outside the directions leads": lambda p: p["outside"] > p["inside"],
    }
    for group, chosen in places.items():
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


CORRELATIONS = ("predictor", "in its first foreign phase", "in the whole run", "over domains at a step")
DROPS = ("pairs where", "count", "true", "predicted", "measured", "predicted off by", "measured off by")


def correlations(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows under `CORRELATIONS`: the mean, and every run."""
    rows = []
    for name, about in PREDICTORS.items():
        cells = []
        for span in SPANS:
            found = summary["rank_correlation"][span].get(name, {"mean": math.nan, "by_run": []})
            cells.append(f"{found['mean']:.2f} ({', '.join(f'{value:.2f}' for value in found['by_run'])})")
        rows.append((about, *cells))
    return rows


def drops(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows under `DROPS`: means of the drop, true, predicted and measured, and of the errors of both."""
    keys = ("true", "predicted", "measured", "predicted_error", "measured_error")
    return [
        (group, str(found["pairs"]), *(f"{found[key]:.3f}" for key in keys))
        for group, found in summary["errors"].items()
    ]


def main() -> None:
    """Run all and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bed", choices=sorted(BEDS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--guarded", action="store_true", help="predict guarded training")
    options = parser.parse_args()
    name = f"prediction_{options.bed}{'_guarded' if options.guarded else ''}"
    jobs = [(options.bed, seed, order, options.guarded) for seed in options.seeds for order in options.orders]
    summary = summarise(run_all(name, one, jobs, options.workers, summarise))
    show("Rank correlation with the true drop, mean (every run)", CORRELATIONS, correlations(summary))
    show("Mean drop", DROPS, drops(summary))


if __name__ == "__main__":
    main()
