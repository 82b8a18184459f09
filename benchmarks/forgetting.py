"""Forgetting on the bed: plain at several learning rates, guarded, mixed, and how well it is predicted.

    python -m benchmarks.forgetting [--seeds 0 1 2] [--workers 2] [--only plain guarded]

Writes `benchmarks/results/forgetting.json`: every run's pass rates by domain, and the summary that the
README quotes. One run takes about 80 seconds on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

from .processes import finished
from .provenance import RESULTS, write

RATE = 7e-4
PLAIN_RATES = (1e-4, 2e-4, 3e-4, RATE)
MIXED_RATES = (3e-4, RATE)
OBSERVED_RATES = (3e-4, 5e-4, RATE)
OBSERVED_ROWS = 512


def plan(seeds: list[int], methods: list[str]) -> list[dict[str, Any]]:
    """Keyword arguments of every `Run`."""
    from .bed.domains import ORDER

    made: list[dict[str, Any]] = []
    for seed in seeds:
        made += [{"method": "plain", "rate": rate, "seed": seed} for rate in PLAIN_RATES]
        made += [{"method": "guarded", "rate": RATE, "seed": seed}]
        made += [{"method": "mixed", "rate": rate, "seed": seed} for rate in MIXED_RATES]
        observed = {"method": "observed", "seed": seed, "guard": {"retain": OBSERVED_ROWS, "first_order": True}}
        made += [{"rate": rate, **observed} for rate in OBSERVED_RATES]
    return [{"order": ORDER, **item} for item in made if item["method"] in methods]


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own, on one thread."""
    import torch

    torch.set_num_threads(1)
    from dataclasses import asdict

    from .bed.run import Run
    from .bed.training import train

    result = train(Run(**arguments), every=arguments.get("steps", Run.steps))
    return {
        **asdict(result),
        "average": result.average,
        "forgetting": result.forgetting,
        "last": result.own[arguments["order"][-1]],
        "metrics": result.metrics[-1:],
    }


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds by method and rate, the bars, and the rank correlations."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["run"]["method"], run["run"]["rate"]), []).append(run)
    table = [
        {
            "method": method,
            "rate": rate,
            "seeds": sorted(item["run"]["seed"] for item in group),
            **{key: mean([item[key] for item in group]) for key in ("average", "forgetting", "last")},
            "own": mean([mean(list(item["own"].values())) for item in group]),
            "overhead": mean([sum(item["guard_seconds"].values()) / item["seconds"] for item in group]),
        }
        for (method, rate), group in groups.items()
    ]
    summary: dict[str, Any] = {"by_method": table}
    rows = {(row["method"], row["rate"]): row for row in table}
    guarded, plain = rows.get(("guarded", RATE)), rows.get(("plain", RATE))
    best = max((row for row in table if row["method"] == "plain"), key=lambda row: row["average"], default=None)
    if guarded and plain and best:
        summary["bars"] = {
            "plain_forgetting": plain["forgetting"],
            "guarded_forgetting": guarded["forgetting"],
            "average_over_plain_same_rate": guarded["average"] - plain["average"],
            "best_plain_rate": best["rate"],
            "average_over_plain_best_rate": guarded["average"] - best["average"],
            "last_domain_minus_plain": guarded["last"] - plain["last"],
        }
    for rate in sorted({run["run"]["rate"] for run in runs if run["pairs"]}):
        found = correlations([run for run in runs if run["pairs"] and run["run"]["rate"] == rate])
        summary.setdefault("spearman", {})[f"{rate:g}"] = found
    return summary


def correlations(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation of raw prediction and measurement within each domain, mean over seeds.

    Over the first foreign phase, in which the displacement goes one way, and over the whole run, in which
    several domains pull in turn; the measurement in reward and, beside it, in nats. The quadratic prediction
    needs no calibration to be ranked. With the first-order term the two parts are weighed by the coefficients
    that the guard's own probes had fitted at the end of the span.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        steps = run["run"]["steps"]
        for place, domain in enumerate(run["run"]["order"][:-1]):
            pairs = [pair for pair in run["pairs"] if pair["domain"] == domain]
            first = [pair for pair in pairs if pair["step"] <= (place + 2) * steps]
            for span, chosen in (("first_phase", first), ("whole_run", pairs)):
                quadratic, linear = chosen[-1]["slopes"]
                parts = {"": [pair["raw"] for pair in chosen]}
                # Where neither part explains a loss there is nothing to weigh.
                if quadratic > 0 or linear > 0:
                    parts["_first_order"] = [quadratic * p["raw"] + linear * p["linear"] for p in chosen]
                else:
                    parts["_first_order"] = parts[""]
                for unit, key in (("reward", "loss"), ("nats", "kl")):
                    truth = [pair[key] for pair in chosen]
                    for term, predicted in parts.items():
                        name = f"{span}_{unit}{term}"
                        found.setdefault(name, {}).setdefault(domain, []).append(spearman(predicted, truth))
    table = {name: {domain: mean(values) for domain, values in by.items()} for name, by in found.items()}
    if not table:
        return {}
    return {"by_domain": table, "mean": {name: mean(list(by.values())) for name, by in table.items()}}


def show(summary: dict[str, Any]) -> None:
    """Print the summary."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "method", "rate", "seeds", "own", "final", "forgetting", "last", "overhead", title="Means over seeds"
    )
    for row in summary["by_method"]:
        numbers = [f"{row[key]:.3f}" for key in ("own", "average", "forgetting", "last")]
        table.add_row(row["method"], f"{row['rate']:g}", str(row["seeds"]), *numbers, f"{row['overhead']:.1%}")
    console = Console()
    console.print(table)
    for key in ("bars", "spearman"):
        if key in summary:
            console.print({key: summary[key]})


def main() -> None:
    """Run all, two at once by default, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["plain", "guarded", "mixed", "observed"])
    parser.add_argument("--rates", type=float, nargs="+", help="only runs at these learning rates")
    parser.add_argument("--add", action="store_true", help="keep other runs that the results file holds")
    parser.add_argument("--name", default="forgetting", help="name of the results file")
    options = parser.parse_args()
    jobs = [
        job for job in plan(options.seeds, options.only) if options.rates is None or job["rate"] in options.rates
    ]
    keys = {(job["method"], job["rate"], job["seed"]) for job in jobs}
    runs: list[dict[str, Any]] = []
    if options.add and (RESULTS / f"{options.name}.json").is_file():
        earlier = json.loads((RESULTS / f"{options.name}.json").read_text(encoding="utf-8"))["runs"]
        runs = [r for r in earlier if (r["run"]["method"], r["run"]["rate"], r["run"]["seed"]) not in keys]
    started = time.perf_counter()
    for count, last in enumerate(finished(work, [(job,) for job in jobs], options.workers), 1):
        runs.append(last)
        runs.sort(key=lambda r: (r["run"]["method"], r["run"]["rate"], r["run"]["seed"]))
        path = write(options.name, {"summary": summarise(runs), "runs": runs})
        minutes = (time.perf_counter() - started) / 60
        label = f"{last['run']['method']} {last['run']['rate']:g} seed {last['run']['seed']}"
        print(
            f"{count}/{len(jobs)} after {minutes:.0f} min: {label}: average {last['average']:.3f}, "
            f"forgetting {last['forgetting']:.3f}",
            flush=True,
        )
    summary = summarise(runs)
    show(summary)
    assert all(math.isfinite(row["average"]) for row in summary["by_method"])
    print(f"written to {path}")


if __name__ == "__main__":
    main()
