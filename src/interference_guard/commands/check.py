"""`check`: a gate for scripts, passed or not passed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from interference_guard.errors import ConfigError, ReportError
from interference_guard.report.run import read_run
from interference_guard.report.transfer import losses

from . import output


def check(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its history file.")],
    max_forgetting: Annotated[float | None, typer.Option(help="Most reward any domain may have lost.")] = None,
    max_interference: Annotated[
        float | None, typer.Option(help="Most interference any domain's last probe may have measured.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Exit with 1 when a domain has lost more than allowed, else with 0.

    Example: interference-guard check outputs/run --max-forgetting 0.02 --json
    """
    if max_forgetting is None and max_interference is None:
        raise ConfigError("No limit is given. Pass --max-forgetting or --max-interference.")
    found = read_run(run)
    results: list[dict[str, Any]] = []
    measured = {name: points[-1][1] for name in found.domains if (points := found.metric(name, "measured"))}
    for kind, limit, values in (
        ("forgetting", max_forgetting, losses(found)),
        ("interference", max_interference, measured),
    ):
        if limit is None:
            continue
        if not values:
            # A gate that has seen nothing must not open.
            raise ReportError(
                f"{found.path} has no {kind} of any domain: no domain was followed by another one, or nothing "
                "was evaluated or measured. Check a run of at least two domains."
            )
        results += [
            {"domain": name, "what": kind, "value": value, "limit": limit, "passed": value <= limit}
            for name, value in values.items()
        ]
    passed = all(item["passed"] for item in results)
    if json:
        output.as_json({"passed": passed, "skipped_lines": found.recorded.skipped, "checks": results})
    else:
        rows = [
            [item["domain"], item["what"], output.number(item["value"], ".4f"), f"{item['limit']:g}",
             "ok" if item["passed"] else "over"]
            for item in results
        ]  # fmt: skip
        output.table("passed" if passed else "not passed", ["domain", "what", "value", "limit", ""], rows)
    if not passed:
        raise typer.Exit(1)
