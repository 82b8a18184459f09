"""`inspect`: what a run, or a saved state, holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from interference_guard.errors import GuardError, StateError
from interference_guard.history import HISTORY
from interference_guard.report.run import Run, find_state, own_state, read_run
from interference_guard.report.transfer import losses

from . import output

# Of each domain, by what the table calls it: its name in the JSON, and its form.
COLUMNS = {
    "reward": ("reward", ".3f"),
    "lost": ("lost", ".3f"),
    "predicted": ("predicted", ".4f"),
    "measured": ("measured", ".4f"),
    "radius": ("radius", ".2e"),
    "covered": ("protected_share", ".0%"),
}


def inspect(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint with a guard's state, or a history file.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show each domain's reward, interference, radius and anchor.

    Example: interference-guard inspect outputs/run
    """
    state = find_state(run)
    trouble: list[str] = []
    try:
        history = read_run(run) if (run / HISTORY).is_file() or run.is_file() else None
    except GuardError as error:
        # The state is worth showing without it.
        if state is None:
            raise
        history = None
        trouble.append(
            f"No history: {error} So nothing says whether the state is of this run or of a former one."
        )
    if history is None and state is None:
        raise StateError(
            f"{run} holds neither a guard's history nor a guard's state. Give the folder a guarded run wrote to "
            "(output_dir) or one of its checkpoints."
        )
    found: dict[str, Any] = {"run": str(run)}
    if history is not None:
        steps = int(history.last)
        found |= {"steps": steps, "skipped_lines": history.recorded.skipped, "domains": _domains(history)}
        state, former = own_state(history)
        trouble += [former] if former is not None else []
    if state is not None:
        found["state"] = str(state)
        try:
            found |= _anchors(state)
        except GuardError as error:
            # The history is worth showing without it.
            if history is None:
                raise
            trouble.append(f"No anchors: {error}")
    if trouble:
        found["trouble"] = " ".join(trouble)
    if json:
        output.as_json(found)
        return
    if history is not None:
        _show(found)
        output.notes(history.recorded.notes)
    output.notes(trouble)
    if "anchors" in found:
        rows = [
            [name, str(item["anchored"]), str(item["steps_since"]), output.number(item["reward_at_anchor"])]
            for name, item in found["anchors"].items()
        ]
        title = f"State in {state}, of step {found['state_steps']}"
        output.table(title, ["domain", "anchored", "steps since", "reward then"], rows)


def _show(found: dict[str, Any]) -> None:
    rows = [
        [name, *(output.number(values.get(key), form) for key, form in COLUMNS.values()), values["unit"] or "-"]
        for name, values in found["domains"].items()
    ]
    output.table(f"{found['run']}: {found['steps']:g} steps", ["domain", *COLUMNS, "unit"], rows)
    kinds = {name: values["reward_kind"] for name, values in found["domains"].items() if "reward" in values}
    training = [name for name, kind in kinds.items() if kind == "training"]
    if training and len(training) < len(kinds):
        output.line(f"Not evaluated, so that the reward is that of training: {', '.join(training)}.")


def _domains(run: Run) -> dict[str, dict[str, Any]]:
    rates, kinds = run.rates()
    lost = losses(run)
    found: dict[str, dict[str, Any]] = {}
    for name in run.domains:
        keys = ("radius", "protected_share")
        values: dict[str, Any] = {key: points[-1][1] for key in keys if (points := run.metric(name, key))}
        now = {key: run.current(name, key) for key in ("predicted", "measured")}
        values |= {key: value for key, value in now.items() if value is not None}
        if name in rates:
            values |= {"reward": rates[name][-1][1], "reward_kind": kinds[name]}
        if name in lost:
            values["lost"] = lost[name]
        # Of the prediction and the measurement; before the first one there is none.
        measured = run.metric(name, "measured")
        values["unit"] = None if not measured else "nats" if run.in_nats(name) else "reward"
        found[name] = values
    return found


def _anchors(state: Path) -> dict[str, Any]:
    from interference_guard.analysis.state import StateFile

    file = StateFile(state)
    anchors = {
        name: {
            "anchored": record.details["anchored"],
            "steps_since": record.details["foreign_steps"],
            "reward_at_anchor": record.details["anchor_reward"],
        }
        for name, record in file.domains.items()
    }
    return {"state_steps": file.steps, "anchors": anchors}
