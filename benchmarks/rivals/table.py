"""What the runs say: one row a method, at its tuned rate and strength, over seeds and orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from ..bed.beds import Bed
from .registry import RIVALS
from .tuning import SEEDS, Tuning, key, tuning_runs

# What every other method is compared with, run by run.
HEADLINE = "guard"


def summarise(
    bed: Bed,
    runs: Sequence[dict[str, Any]],
    seeds: Sequence[int] = SEEDS,
    elsewhere: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Rows of the table, best average first, what tuning tried, and how many runs are still missing.

    Args:
        bed: The bed.
        runs: Those of one kind of machine.
        seeds: Of the runs that are compared.
        elsewhere: Runs of another kind of machine that methods were tuned on; they are in no row.
    """
    tuned = (*tuning_runs(elsewhere), *runs)
    found = {key(run["run"]): run for run in tuned}
    averages = {name: run["average"] for name, run in found.items()}
    rows, missing, tries = [], {}, {}
    for name, rival in RIVALS.items():
        tuning = Tuning(name, rival, bed, averages, seeds)
        needed, chosen = tuning.needed()
        tried = [run for run in tuning_runs(tuned) if run["run"]["method"] == name]
        if tried:
            tried.sort(key=lambda run: -run["average"])
            tries[name] = [[run["run"]["rate"], run["run"]["strength"], run["average"]] for run in tried]
        if needed:
            missing[name] = len(needed) if chosen else None
        if chosen is None:
            continue
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for run in tuning.compared(*chosen):
            if tuning.score(run) is not None:
                by_rate.setdefault(run.rate, []).append(found[key(asdict(run))])
        for rate, group in by_rate.items():
            about = {"method": name, "strength": chosen[1], "rate": rate, "tuned": rate == chosen[0]}
            about |= {"at_edge": tuning.at_edge(*chosen), "rehearses": rival.rehearses}
            rows.append({**about, **_means(group), "by_run": _by_run(group)})
    headline = next((row["by_run"] for row in rows if row["method"] == HEADLINE and row["tuned"]), {})
    for row in rows:
        pairs = {k: headline[k] - row["by_run"][k] for k in row["by_run"] if k in headline}
        row["guard_beyond"] = fmean(pairs.values()) if pairs else None
        row["guard_beyond_error"] = _error(pairs)
    rows.sort(key=lambda row: -row["average"])
    return {"rows": rows, "tuning": tries, "missing": missing}


def _by_run(group: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Averages by seed and first domain, which tells the order."""
    return {f"{run['run']['seed']} {run['run']['order'][0]}": run["average"] for run in group}


def _error(by_run: dict[str, float]) -> float | None:
    """Standard error over seeds: both orders of a seed share its start, so their mean counts once."""
    seeds: dict[str, list[float]] = {}
    for name, value in by_run.items():
        seeds.setdefault(name.split()[0], []).append(value)
    means = [fmean(values) for values in seeds.values()]
    return stdev(means) / len(means) ** 0.5 if len(means) > 1 else None


def _means(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    averages = [run["average"] for run in group]
    return {
        "runs": len(group),
        "average": fmean(averages),
        "standard_error": _error(_by_run(group)),
        "worst": min(averages),
        "forgetting": fmean(run["forgetting"] for run in group),
        "own": fmean(fmean(run["own"].values()) for run in group),
        "last": fmean(run["last"] for run in group),
        "method_bytes": max(run["method_bytes"] for run in group),
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    numbers = ("own", "final", "± s.e.", "worst", "forgetting", "last", "guard beyond")
    table = Table("method", "strength", "rate", "runs", *numbers, title="Means over seeds and orders")
    for row in summary["rows"]:
        cells = [f"{row[name]:.3f}" for name in ("own", "average")]
        cells += [_signed(row["standard_error"], "{:.3f}")]
        cells += [f"{row[name]:.3f}" for name in ("worst", "forgetting", "last")]
        cells += [f"{_signed(row['guard_beyond'])} ± {_signed(row['guard_beyond_error'], '{:.3f}')}"]
        mark = " (rehearses)" if row["rehearses"] else ""
        edge = " (edge)" if row["at_edge"] and row["tuned"] else ""
        place = (row["method"] + mark, _text(row["strength"]), f"{row['rate']:g}{edge}", str(row["runs"]))
        table.add_row(*place, *cells, style=None if row["tuned"] else "dim")
    # Wider than a narrow terminal: a table without its figures says nothing.
    Console(width=max(Console().width, 130)).print(table)
    for name, items in summary["tuning"].items():
        tries = [f"{rate:g} {_text(strength)}: {average:.3f}" for rate, strength, average in items]
        print(f"{name}: {', '.join(tries)}")
    if summary["missing"]:
        print(f"Still to be run: {summary['missing']}")


def markdown(summary: dict[str, Any]) -> str:
    """The table as a page of the documentation shows it."""
    head = ("method", "strength", "rate", "final", "± s.e.", "guard beyond", "forgetting", "own", "worst run")
    lines = [head, ("---",) * len(head)]
    for row in summary["rows"]:
        beyond = "" if row["method"] == HEADLINE else _signed(row["guard_beyond"])
        name = f"**{row['method']}**" if row["tuned"] else row["method"]
        cells = (f"{row['average']:.3f}", _signed(row["standard_error"], "{:.3f}"), beyond)
        cells += tuple(f"{row[key]:.3f}" for key in ("forgetting", "own", "worst"))
        lines.append((name, _text(row["strength"]), f"{row['rate']:g}", *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _signed(value: float | None, form: str = "{:+.3f}") -> str:
    return "" if value is None else form.format(value)


def _text(strength: Any) -> str:
    return "" if strength is None else str(strength)
