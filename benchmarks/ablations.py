"""The guard with one setting changed at a time, on the beds of `benchmarks.rivals`.

    python -m benchmarks.ablations --bed digits [--only "rank 4" ...] [--seeds 0 1] [--rate 1e-3] [--workers 2]

Everything else stays at its default, at one learning rate. Writes `benchmarks/results/ablations_<bed>.json` after
every run and goes on from it when started again; at another rate than the bed's, that is part of the name, as is
the processor's maker where the file there is was made on another one's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

from transformers import TrainerCallback

from .bed.beds import BEDS
from .bed.method import Guarded
from .bed.run import Result, Run
from .processes import finished
from .provenance import RESULTS, here, write
from .rivals.running import result_of


class ByKL(Guarded):
    """Measured in nats per token: the guard is not told any reward."""

    def attach(self, trainer: Any, result: Result) -> None:
        super().attach(trainer, result)
        assert self.callback is not None
        assert self.callback.guard is not None
        retain = self.callback.guard.retain

        def without(domain: str, completions: Any) -> None:
            retain(domain, replace(completions, rewards=None))

        self.callback.guard.retain = without


class Kept(Guarded):
    """Regions move with the directions they have, as on sharded models."""

    def attach(self, trainer: Any, result: Result) -> None:
        super().attach(trainer, result)
        assert self.callback is not None
        assert self.callback.guard is not None
        self.callback.guard.differentiates = False


class Softened(Guarded):
    """Curvature from backward passes at the end of a phase, labels drawn from the softened output."""

    def attach(self, trainer: Any, result: Result) -> None:
        super().attach(trainer, result)
        trainer.add_callback(_Soften(self))


class _Soften(TrainerCallback):
    def __init__(self, method: Guarded) -> None:
        self.method = method

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from interference_guard.reference import observe_softened

        run, callback = self.method.run, self.method.callback
        guard = callback.guard if callback is not None else None
        if guard is None or state.global_step % run.steps:
            return
        domain = guard.domains[run.order[state.global_step // run.steps - 1]]
        rows = domain.latest(guard.config.retain)
        assert rows is not None
        domain.curvature = guard.new_state(domain.name).curvature
        observe_softened(guard, domain.curvature, rows, passes=64, batch_size=8)


# What differs from the defaults; a kind is no setting of the guard but a class of its own.
VARIANTS: dict[str, Mapping[str, Any]] = {
    "default": {},
    "rank 4": {"rank": 4},
    "rank 8": {"rank": 8},
    "rank 32": {"rank": 32, "sketch": 64},
    "residual 2": {"residual": 2},
    "residual 32": {"residual": 32},
    "no renewal": {"renew": False},
    "renewal without new directions": {"kind": "kept"},
    "coverage 0.8": {"coverage": 0.8},
    "coverage 0.5": {"coverage": 0.5},
    "coverage 0.5 by edits": {"coverage": 0.5, "selection": "edits"},
    "coverage 0.5 at random": {"coverage": 0.5, "selection": "random"},
    "half-life 10": {"half_life": 10.0},
    "half-life 250": {"half_life": 250.0},
    "retain 32": {"retain": 32},
    "retain 64": {"retain": 64},
    "retain 256": {"retain": 256},
    "probe every 5": {"probe_steps": 5},
    "probe every 50": {"probe_steps": 50},
    "budget 0.005": {"budget": 0.005},
    "budget 0.01": {"budget": 0.01},
    "budget 0.01, no renewal": {"budget": 0.01, "renew": False},
    "budget 0.05": {"budget": 0.05},
    "budget 0.15": {"budget": 0.15},
    "first order": {"first_order": True},
    "one sweep": {"sweeps": 1},
    "gradient metric": {"projection_metric": "gradient"},
    "measured in nats": {"kind": "nats"},
    "measured in nats, 0.03": {"kind": "nats", "budget_nats": 0.03},
    "softened Gauss-Newton": {"kind": "softened"},
}
KINDS = {"kept": Kept, "nats": ByKL, "softened": Softened}


def one(variant: str, bed: str, rate: float, seed: int, order: int, starts: str) -> dict[str, Any]:
    """One run in a process of its own."""
    settings = {name: value for name, value in VARIANTS[variant].items() if name != "kind"}
    where = BEDS[bed]
    run = Run("guard", rate, seed, where.orders[order], where.steps, settings, bed=bed)
    kind = KINDS.get(VARIANTS[variant].get("kind", ""), Guarded)
    return {"variant": variant, "order": order, **result_of(run, kind(run), starts)}


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: means, and the differences to the default on the same seeds and orders."""
    defaults = {(run["run"]["seed"], run["order"]): run for run in runs if run["variant"] == "default"}
    rows = []
    for variant in VARIANTS:
        group = [run for run in runs if run["variant"] == variant]
        if not group:
            continue
        places = [(run, (run["run"]["seed"], run["order"])) for run in group]
        pairs = [(run, defaults[place]) for run, place in places if place in defaults]
        rows.append(
            {
                "variant": variant,
                "runs": len(group),
                "average": fmean(run["average"] for run in group),
                "forgetting": fmean(run["forgetting"] for run in group),
                "own": fmean(fmean(run["own"].values()) for run in group),
                "differences": [run["average"] - default["average"] for run, default in pairs],
                "more_forgotten": [run["forgetting"] - default["forgetting"] for run, default in pairs],
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table that the documentation shows: what each variant adds to the default's means."""
    lines = ["| changed | runs | final | by run | forgetting |", "|---|---|---|---|---|"]
    for row in rows:
        final, lost = row["differences"], row["more_forgotten"]
        if row["variant"] != "default" and final:
            by_run = ", ".join(f"{value:+.3f}" for value in final)
            cells = (row["variant"], str(len(final)), f"{fmean(final):+.3f}", by_run, f"{fmean(lost):+.3f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then show the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bed", choices=sorted(BEDS), default="digits")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rate", type=float)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--suffix", default="", help="of the results file's name, for runs of a table of their own"
    )
    options = parser.parse_args()
    usual = BEDS[options.bed].rate
    rate = usual if options.rate is None else options.rate
    name = here(f"ablations_{options.bed}" + ("" if rate == usual else f"_{rate:g}") + options.suffix)
    path = RESULTS / f"{name}.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    there = {(run["variant"], run["run"]["seed"], run["order"]) for run in runs}
    jobs = [
        (variant, options.bed, rate, seed, order)
        for seed in options.seeds
        for order in options.orders
        for variant in options.only
        if (variant, seed, order) not in there
    ]
    with tempfile.TemporaryDirectory() as starts:
        for found in finished(one, [(*job, starts) for job in jobs], options.workers, 1):
            runs.append(found)
            runs.sort(key=lambda run: (list(VARIANTS).index(run["variant"]), run["run"]["seed"], run["order"]))
            write(name, {"rows": summarise(runs), "runs": runs})
            print(f"{found['variant']}: average {found['average']:.3f}, {found['seconds']:.0f} s", flush=True)
    print(markdown(summarise(runs)))


if __name__ == "__main__":
    main()
