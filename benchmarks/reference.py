"""An ability that only the warm start taught, while seven other domains are trained: plain and protected.

    python -m benchmarks.reference [--seeds 0 1 2] [--budgets 0.01 0.003] [--workers 2] [--rate 7e-4]

Writes `benchmarks/results/reference.json`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from .forgetting import RATE, mean, work
from .processes import finished
from .provenance import RESULTS, write

REFERENCE = "caesar_cipher"
# Of the guard in nats per token, None without it. The first is the default.
BUDGETS = (0.01, 0.003)


def one(budget: float | None, rate: float, seed: int) -> dict[str, Any]:
    """One run in a process of its own."""
    from .bed.domains import ORDER

    order = tuple(name for name in ORDER if name != REFERENCE)
    method, guard = ("plain", {}) if budget is None else ("guarded", {"budget_nats": budget})
    found = work(
        {"method": method, "rate": rate, "seed": seed, "order": order, "reference": REFERENCE, "guard": guard}
    )
    before, after = found["start"][REFERENCE], found["curve"][-1][REFERENCE]
    return {**found, "reference": {"before": before, "after": after, "lost": before - after}}


def label(run: dict[str, Any]) -> str:
    """The method of a run, with its budget."""
    budget = run["run"]["guard"].get("budget_nats")
    return "plain" if budget is None else f"guarded, {budget:g}"


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds by method, in the order of the runs."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(label(run), []).append(run)
    return {
        method: {
            "average": mean([run["average"] for run in group]),
            "forgetting": mean([run["forgetting"] for run in group]),
            **{key: mean([run["reference"][key] for run in group]) for key in ("before", "after", "lost")},
            "lost_by_seed": {str(run["run"]["seed"]): run["reference"]["lost"] for run in group},
        }
        for method, group in groups.items()
    }


def show(summary: dict[str, Any]) -> None:
    """Print the summary."""
    from rich.console import Console
    from rich.table import Table

    title = f"{REFERENCE}, known from the warm start alone; pass rates, means over seeds"
    table = Table("method", "before", "after", "lost", "average of the trained domains", title=title)
    for method, row in summary.items():
        table.add_row(method, *(f"{row[key]:.3f}" for key in ("before", "after", "lost", "average")))
    Console().print(table)


def main() -> None:
    """Run all, two at once by default, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="in nats per token")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args()
    jobs = [(budget, options.rate, seed) for seed in options.seeds for budget in (None, *options.budgets)]
    runs: list[dict[str, Any]] = []
    for last in finished(one, jobs, options.workers):
        runs.append(last)
        # Plain first, then from the largest budget on.
        runs.sort(key=lambda run: (-run["run"]["guard"].get("budget_nats", math.inf), run["run"]["seed"]))
        path = write("reference", {"summary": summarise(runs), "runs": runs}, options.out)
        print(
            f"{label(last)}, seed {last['run']['seed']}: {json.dumps(last['reference'])}",
            flush=True,
        )
    show(summarise(runs))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
