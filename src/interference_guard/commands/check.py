"""`check`: a gate for scripts, passed or not passed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from interference_guard.errors import ConfigError, ReportError
from interference_guard.report.run import Run, read_run
from interference_guard.report.transfer import losses

from . import output


def check(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its history file.")],
    max_forgetting: Annotated[float | None, typer.Option(help="Most reward any domain may have lost.")] = None,
    max_interference: Annotated[
        float | None,
        typer.Option(
            help="Most interference that any domain's last probe may have measured, as a share of its reward "
            "range; for domains without rewards in nats per token."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Exit with 1 if a domain has lost more than allowed, with 2 if the loss of one is not known, else with 0.

    Example: interference-guard check outputs/run --max-forgetting 0.02 --json
    """
    if max_forgetting is None and max_interference is None:
        raise ConfigError("No limit is given. Pass --max-forgetting or --max-interference.")
    for name, limit in (("--max-forgetting", max_forgetting), ("--max-interference", max_interference)):
        # With such a limit every run would pass, or none.
        if limit is not None and not 0 <= limit < math.inf:
            raise ConfigError(
                f"{name} {limit!r} is not allowed: it must be a number of at least 0, for instance 0.02."
            )
    found = read_run(run)
    results: list[dict[str, Any]] = []
    if max_forgetting is not None:
        # What has no rewards can lose none: where the other limit is given, that one is for it.
        spared = {name for name in found.domains if found.in_nats(name) and max_interference is not None}
        results += _judged(found, "forgetting", max_forgetting, losses(found), spared)
    if max_interference is not None:
        results += _judged(found, "interference", max_interference, _measured(found), set())
    judged = {item["domain"] for item in results}
    _show(found, results, [name for name in found.domains if name in found.guarded and name not in judged], json)
    if any(item["value"] is not None and not item["passed"] for item in results):
        raise typer.Exit(1)
    unseen = sorted({repr(item["domain"]) for item in results if item["value"] is None})
    if unseen:
        raise ReportError(
            f"{found.path} does not say what {', '.join(unseen)} lost since other domains are trained, and the "
            "gate stays shut. Evaluate every domain after the last phase. For one without rewards pass "
            "--max-interference, for one without probes --max-forgetting."
        )


def _judged(
    run: Run, kind: str, limit: float, values: dict[str, float], spared: set[str]
) -> list[dict[str, Any]]:
    """A row for each domain with a value, and for each that should have one."""
    if not values and not any(map(run.followed, run.domains)):
        # A gate that has seen nothing must not open.
        raise ReportError(
            f"{run.path} has no {kind} of any domain: no domain was followed by another one, or nothing "
            "was evaluated or measured. Check a run of at least two domains."
        )
    return [
        {
            "domain": name,
            "what": kind,
            "unit": _unit(run, name, kind),
            "value": values.get(name),
            "limit": limit,
            "passed": name in values and values[name] <= limit,
        }
        for name in run.domains
        if name in values or (run.followed(name) and name not in spared)
    ]


def _measured(run: Run) -> dict[str, float]:
    values = {name: run.current(name, "measured") for name in run.domains}
    return {name: value for name, value in values.items() if value is not None}


def _unit(run: Run, name: str, kind: str) -> str:
    if kind == "forgetting":
        return "reward"
    return output.UNITS["nats" if run.in_nats(name) else "reward"]


def _show(run: Run, results: list[dict[str, Any]], others: list[str], json: bool) -> None:
    passed = all(item["passed"] for item in results)
    if json:
        output.as_json(
            {
                "passed": passed,
                "skipped_lines": run.recorded.skipped,
                "checks": results,
                "in_training": others,
            }
        )
        return
    rows = [
        [item["domain"], item["what"], item["unit"], output.number(item["value"], ".4f"), f"{item['limit']:g}",
         "ok" if item["passed"] else "not known" if item["value"] is None else "over"]
        for item in results
    ]  # fmt: skip
    columns = ["domain", "what", "unit", "value", "limit", ""]
    output.table("passed" if passed else "not passed", columns, rows)
    output.notes(run.recorded.notes)
    if others:
        output.line(f"Not judged, for they are in training at the end: {', '.join(others)}.")
