"""Recovery phases on the bed: alone, behind a loose projection, and behind the default one.

    python -m benchmarks.recovery [--seeds 0 1 2] [--workers 2] [--only alone ...]

The plain runs are those of `benchmarks/results/forgetting.json`, at the same learning rate. Writes
`benchmarks/results/recovery.json`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from .forgetting import RATE, mean, work
from .processes import finished
from .provenance import RESULTS, write

LOOSE = 0.1
# What differs from the default settings.
VARIANTS: dict[str, dict[str, Any]] = {
    # Nothing else holds the domains here, so they are looked at twice as often.
    "alone": {
        "project": False,
        "recovery": True,
        "recovery_budget": 0.05,
        "recovery_tolerance": 0.03,
        "probe_steps": 10,
    },
    "loose": {"budget": LOOSE},
    "loose with recovery": {
        "budget": LOOSE,
        "recovery": True,
        "recovery_budget": 0.05,
        "recovery_tolerance": 0.02,
    },
    "default with recovery": {"recovery": True},
}


def one(variant: str, seed: int) -> dict[str, Any]:
    """One run in a process of its own."""
    from .bed.domains import ORDER

    found = work({"method": "guarded", "rate": RATE, "seed": seed, "order": ORDER, "guard": VARIANTS[variant]})
    steps = found["run"]["steps"] * len(ORDER)
    taken = sum(phase["taken"] for phase in found["recoveries"])
    return {"variant": variant, **found, "recovery_share": taken / steps}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds by variant, beside the plain runs, and what recovery closed."""
    plain = [
        run
        for run in json.loads((RESULTS / "forgetting.json").read_text(encoding="utf-8"))["runs"]
        if run["run"]["method"] == "plain" and run["run"]["rate"] == RATE
    ]
    rows: dict[str, Any] = {}
    for name, group in [("plain", plain)] + [(v, [r for r in runs if r["variant"] == v]) for v in VARIANTS]:
        if group:
            rows[name] = {key: mean([run[key] for run in group]) for key in ("average", "forgetting", "last")}
            rows[name]["recovery_share"] = mean([run.get("recovery_share", 0.0) for run in group])
            rows[name]["seeds"] = {str(run["run"]["seed"]): run["forgetting"] for run in group}
    summary: dict[str, Any] = {"by_variant": rows}
    if "alone" in rows:
        summary["alone_closes"] = 1 - rows["alone"]["forgetting"] / rows["plain"]["forgetting"]
    if "loose" in rows and "loose with recovery" in rows:
        loose = rows["loose"]["forgetting"]
        summary["loose_closes"] = 1 - rows["loose with recovery"]["forgetting"] / loose if loose > 0 else 1.0
    phases = [phase for run in runs for phase in run["recoveries"]]
    regained = [phase for phase in phases if phase["regained"]]
    told = [phase for phase in regained if phase["expected"] is not None]
    summary["phases"] = {
        "all": len(phases),
        "regained": len(regained),
        "steps_when_regained": mean([phase["taken"] for phase in regained]) if regained else None,
        "with_an_expected_length": len(told),
        "expected_minus_taken": mean([phase["expected"] - phase["taken"] for phase in told]) if told else None,
    }
    return summary


def main() -> None:
    """Run all, two at once by default, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--add", action="store_true", help="keep other runs that the results file holds")
    options = parser.parse_args()
    jobs = [(variant, seed) for variant in options.only for seed in options.seeds]
    runs: list[dict[str, Any]] = []
    if options.add and (RESULTS / "recovery.json").is_file():
        earlier = json.loads((RESULTS / "recovery.json").read_text(encoding="utf-8"))["runs"]
        runs = [run for run in earlier if (run["variant"], run["run"]["seed"]) not in jobs]
    for last in finished(one, jobs, options.workers):
        runs.append(last)
        runs.sort(key=lambda run: (run["variant"], run["run"]["seed"]))
        path = write("recovery", {"summary": summarise(runs), "runs": runs})
        print(
            f"{last['variant']}, seed {last['run']['seed']}: average {last['average']:.3f}, forgetting "
            f"{last['forgetting']:.3f}, {last['recovery_share']:.1%} of the steps",
            flush=True,
        )
    print(json.dumps(summarise(runs), indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
