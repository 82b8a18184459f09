"""Whether what the guard keeps depends on the policy's width: plain, guarded and mixed training of a wider one.

    python -m benchmarks.width [--hidden 128] [--seeds 0 1 2] [--workers 2]

The bed `gym` in its first order. Each method's rate is the best of `RATES` on the first seed, and is then run on
the others; the guard has its default settings. Writes `benchmarks/results/width.json` after every run and goes on
from it when started again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from .bed.beds import WIDER, named
from .bed.run import Run
from .processes import finished
from .provenance import RESULTS, here, write
from .rivals.running import work
from .tables import markdown

WIDTHS = {bed.hidden: bed.name for bed in WIDER.values()}
# Both neighbours of each method's best are among them.
RATES = {"plain": (5e-5, 1e-4, 2e-4), "guard": (3e-4, 5e-4, 1e-3), "mixed": (1e-4, 2e-4, 3e-4, 5e-4)}
STRENGTHS = {"plain": None, "guard": 0.02, "mixed": "rows"}
HEAD = ("method", "rate", "own", "final", "forgetting", "last domain", "final by seed")

Found = Sequence[dict[str, Any]]


def needed(found: Found, hidden: int, seeds: Sequence[int]) -> list[Run]:
    """The runs of one width that can be made now; none where all are there."""
    bed = named(WIDTHS[hidden])
    runs = {_place(run): run for run in found}

    def missing(seed: int, choice: dict[str, tuple[float, ...]]) -> list[Run]:
        return [
            Run(method, rate, seed, bed.orders[0], bed.steps, bed=bed.name, strength=STRENGTHS[method], tests=512)
            for method, rates in choice.items()
            for rate in rates
            if (hidden, method, rate, seed) not in runs
        ]

    if first := missing(seeds[0], RATES):
        return first
    tuned = {method: (best_rate(found, hidden, method, seeds[0]),) for method in RATES}
    return [run for seed in seeds[1:] for run in missing(seed, tuned)]


def best_rate(found: Found, hidden: int, method: str, seed: int) -> float:
    """The rate at which a method ends highest on a seed."""
    places = [(run["average"], _place(run)) for run in found]
    tried = [(average, rate) for average, (*what, rate, of) in places if (what, of) == ([hidden, method], seed)]
    return max(tried)[1]


def summarise(found: Found, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each method of each width at its tuned rate, over the seeds that it was run on."""
    rows = []
    for hidden in sorted({_place(run)[0] for run in found}):
        if needed(found, hidden, seeds):
            continue
        groups = {}
        for method in RATES:
            rate = best_rate(found, hidden, method, seeds[0])
            groups[method] = sorted(
                (run for run in found if _place(run)[:3] == (hidden, method, rate)),
                key=lambda run: _place(run)[3],
            )
        for method, group in groups.items():
            averages = [run["average"] for run in group]
            beyond = [run["average"] - other for run, other in zip(groups["guard"], averages, strict=True)]
            rows.append(
                {
                    "width": hidden,
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


def _place(run: dict[str, Any]) -> tuple[int, str, float, int]:
    settings = run["run"]
    return named(settings["bed"]).hidden, settings["method"], settings["rate"], settings["seed"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table that the documentation shows."""
    cells = []
    for row in rows:
        means = [f"{row[name]:.3f}" for name in ("own", "final", "forgetting", "last")]
        cells.append((row["method"], f"{row['rate']:g}", *means, ", ".join(f"{a:.3f}" for a in row["by_seed"])))
    return markdown(HEAD, cells)


def main() -> None:
    """Run what is missing, then show the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, choices=sorted(WIDTHS), default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first is for tuning too")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("--seeds needs two or more, for a standard error.")
    name = here("width")
    path = RESULTS / f"{name}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    with tempfile.TemporaryDirectory() as starts:
        while jobs := needed(runs, options.hidden, options.seeds):
            for found in finished(work, [(job, starts) for job in jobs], options.workers, 1):
                runs.append(found)
                runs.sort(key=_place)
                write(name, {"rows": summarise(runs, options.seeds), "runs": runs})
                run = found["run"]
                label = f"{run['bed']} {run['method']} {run['rate']:g} seed {run['seed']}"
                print(
                    f"{label}: average {found['average']:.3f}, forgetting {found['forgetting']:.3f}", flush=True
                )
    print(table(summarise(runs, options.seeds)))


if __name__ == "__main__":
    main()
