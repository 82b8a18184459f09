"""What the runs say: one row a method, at its tuned rate and strength, over seeds and orders."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from ..bed.beds import Bed
from .registry import RIVALS
from .tuning import SEEDS, Tuning, key

# Methods that see all domains all the time; the others follow one after the other.
JOINT = ("mixed",)


def summarise(bed: Bed, runs: Sequence[dict[str, Any]], seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Rows of the table, best average first, and how many runs are still missing."""
    found = {key(run["run"]): run for run in runs}
    averages = {name: run["average"] for name, run in found.items()}
    rows, missing = [], {}
    for name, rival in RIVALS.items():
        tuning = Tuning(name, rival, bed, averages, seeds)
        needed, chosen = tuning.needed()
        if needed:
            missing[name] = len(needed) if chosen else None
        if chosen is None:
            continue
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for run in tuning.compared(*chosen):
            if tuning.score(run) is not None:
                by_rate.setdefault(run.rate, []).append(found[_key(run)])
        rows += [
            {"method": name, "strength": chosen[1], "rate": rate, "tuned": rate == chosen[0], **_means(group)}
            for rate, group in by_rate.items()
        ]
    rows.sort(key=lambda row: -row["average"])
    tries = {
        name: sorted(
            (
                {**{k: run["run"][k] for k in ("rate", "strength")}, "average": run["average"]}
                for run in runs
                if run["run"]["method"] == name and run["run"]["seed"] not in seeds
            ),
            key=lambda item: -item["average"],
        )
        for name in RIVALS
    }
    return {"rows": rows, "tuning": {name: items for name, items in tries.items() if items}, "missing": missing}


def _key(run: Any) -> str:
    from dataclasses import asdict

    return key(asdict(run))


def _means(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    averages = [run["average"] for run in group]
    spread = stdev(averages) / len(averages) ** 0.5 if len(averages) > 1 else None
    return {
        "runs": len(group),
        "average": fmean(averages),
        "standard_error": spread,
        "worst": min(averages),
        "forgetting": fmean(run["forgetting"] for run in group),
        "own": fmean(fmean(run["own"].values()) for run in group),
        "last": fmean(run["last"] for run in group),
        "method_share": fmean(r["method_seconds"] / (r["seconds"] - r["method_seconds"]) for r in group),
        "method_bytes": max(run["method_bytes"] for run in group),
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    columns = (
        "method",
        "strength",
        "rate",
        "runs",
        "own",
        "final",
        "± s.e.",
        "worst",
        "forgetting",
        "last",
        "MiB",
    )
    table = Table(*columns, title="Means over seeds and orders")
    for row in summary["rows"]:
        error = row["standard_error"]
        cells = [f"{row[name]:.3f}" for name in ("own", "average")]
        cells += ["" if error is None else f"{error:.3f}"]
        cells += [f"{row[name]:.3f}" for name in ("worst", "forgetting", "last")]
        cells += [f"{row['method_bytes'] / 2**20:.2f}"]
        place = (row["method"], _text(row["strength"]), f"{row['rate']:g}", str(row["runs"]))
        table.add_row(*place, *cells, style=None if row["tuned"] else "dim")
    Console().print(table)
    for name, items in summary["tuning"].items():
        tries = [f"{item['rate']:g} {_text(item['strength'])}: {item['average']:.3f}" for item in items]
        print(f"{name}: {', '.join(tries)}")
    if summary["missing"]:
        print(f"Still to be run: {summary['missing']}")


def _text(strength: Any) -> str:
    return "" if strength is None else str(strength)
