"""Whether what the guard keeps depends on the policy's width: plain, guarded and mixed training of a wider one.

    python -m benchmarks.width [--seeds 0 1 2] [--workers 2]

The bed `gym` with a policy twice as wide, in its first order. Each method's rate is the best of `RATES` on the
first seed, and is then run on the others; the guard has its default settings. Writes
`benchmarks/results/width.json` after every run and goes on from it when started again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from .bed.beds import WIDE
from .bed.run import Run
from .comparing import run_all
from .provenance import RESULTS, here
from .rivals.running import work
from .tables import show

# Both neighbours of each method's best are among them.
RATES = {"plain": (5e-5, 1e-4, 2e-4), "guard": (3e-4, 5e-4, 1e-3), "mixed": (1e-4, 2e-4, 3e-4, 5e-4)}
STRENGTHS = {"plain": None, "guard": 0.02, "mixed": "rows"}
HEAD = ("method", "rate", "own", "final", "forgetting", "last domain", "final by seed")

Found = Sequence[dict[str, Any]]


def needed(found: Found, seeds: Sequence[int]) -> list[Run]:
    """The runs that can be made now; none where all are there."""
    runs = {_place(run) for run in found}
    order, steps, bed = WIDE.orders[0], WIDE.steps, WIDE.name

    def missing(rates: dict[str, Sequence[float]], seeds: Sequence[int]) -> list[Run]:
        return [
            Run(method, rate, seed, order, steps, bed=bed, strength=STRENGTHS[method], tests=512)
            for seed in seeds
            for method in rates
            for rate in rates[method]
            if (method, rate, seed) not in runs
        ]

    if first := missing(dict(RATES), seeds[:1]):
        return first
    return missing({method: [best_rate(found, method, seeds[0])] for method in RATES}, seeds[1:])


def best_rate(found: Found, method: str, seed: int) -> float:
    """The rate at which a method ends highest on a seed."""
    tried = [run for run in found if (run["run"]["method"], run["run"]["seed"]) == (method, seed)]
    best = max(tried, key=lambda run: run["average"])
    rate: float = best["run"]["rate"]
    return rate


def summarise(found: Found, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each method at its tuned rate, over all seeds; none until all runs are there."""
    if needed(found, seeds):
        return []
    runs = {_place(run): run for run in found}
    groups = {}
    for method in RATES:
        rate = best_rate(found, method, seeds[0])
        groups[method] = [runs[method, rate, seed] for seed in seeds]
    rows = []
    for method, group in groups.items():
        averages = [run["average"] for run in group]
        beyond = [run["average"] - other for run, other in zip(groups["guard"], averages, strict=True)]
        rows.append(
            {
                "method": method,
                "rate": group[0]["run"]["rate"],
                "own": fmean(fmean(run["own"].values()) for run in group),
                "final": fmean(averages),
                "forgetting": fmean(run["forgetting"] for run in group),
                "last": fmean(run["last"] for run in group),
                "by_seed": averages,
                "guard_beyond": fmean(beyond),
                "guard_beyond_error": stdev(beyond) / len(beyond) ** 0.5,
            }
        )
    return rows


def _place(run: dict[str, Any]) -> tuple[str, float, int]:
    settings = run["run"]
    return settings["method"], settings["rate"], settings["seed"]


def cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of the table, as text under `HEAD`."""
    return [
        (
            row["method"],
            f"{row['rate']:g}",
            *(f"{row[name]:.3f}" for name in ("own", "final", "forgetting", "last")),
            ", ".join(f"{average:.3f}" for average in row["by_seed"]),
        )
        for row in rows
    ]


def main() -> None:
    """Run what is missing, then show the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first is for tuning too")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("--seeds needs two or more, for a standard error.")
    name, seeds = here("width"), options.seeds
    path = RESULTS / f"{name}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    while jobs := [(run,) for run in needed(runs, seeds)]:
        runs = run_all(name, work, jobs, options.workers, lambda found: summarise(found, seeds), runs)
    show("gym, policies of width 128", HEAD, cells(summarise(runs, seeds)))


if __name__ == "__main__":
    main()
