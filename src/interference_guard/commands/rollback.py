"""`rollback`: a checkpoint with the part of an edit taken back that harms a domain most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interference_guard.errors import ConfigError

from . import output

if TYPE_CHECKING:
    from interference_guard.analysis import Checkpoint, RollbackPlan

# Part of the edit's predicted interference from which BASE counts as another point than the domain's anchor.
ASTRAY = 0.1
# As many times what rounding BASE to its dtype is predicted to cost, from which it is more than that.
ROUNDING = 3.0


def rollback(
    base: Annotated[
        Path, typer.Argument(help="The checkpoint before the edit: the one where DOMAIN's phase ended.")
    ],
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint after it.")],
    domain: Annotated[str, typer.Option(help="The domain to restore.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the new checkpoint.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder with the guard's state; that of CHECKPOINT by default.")
    ] = None,
    share: Annotated[float, typer.Option(help="Share of the units to roll back, the most harmful first.")] = 0.1,
    strength: Annotated[float, typer.Option(help="Share of their edit that is undone.")] = 1.0,
    mode: Annotated[
        str, typer.Option(help="'directions': only along the domain's directions; 'units': whole units.")
    ] = "directions",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the curve over shares; write nothing.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE with one prompt and completion per line (JSON): measure them before, after and "
            "rolled back. May be repeated; include the domains that the edit was for."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Undo the part of an edit that harms a domain most, without training.

    Units are ranked by the predicted interference with DOMAIN per unit of the edit's squared length.

    Examples: interference-guard rollback after-math final --domain math --dry-run;
    interference-guard rollback after-math final --domain math --share 0.05 -o restored
    --data math=math.jsonl --data code=code.jsonl
    """
    given = _files(data or [])
    if given and (dry_run or out is None):
        raise ConfigError("--data measures the checkpoint that is written. Pass --out FOLDER and not --dry-run.")
    if out is None and not dry_run:
        raise ConfigError("Nothing says where the result goes. Pass --out FOLDER, or --dry-run to see the curve.")
    from interference_guard.analysis import StateFile, open_checkpoint, plan_rollback, write_rollback
    from interference_guard.analysis.measured import nats_per_token, read_rows
    from interference_guard.analysis.rollback import check_amounts
    from interference_guard.analysis.target import check_target

    check_amounts(share=share, strength=strength)
    texts = {name: read_rows(path) for name, path in given.items()}
    record = StateFile(state if state is not None else checkpoint).domain(domain)
    before, after = open_checkpoint(base), open_checkpoint(checkpoint)
    # First what can fail: scoring and measuring take long.
    if out is not None and not dry_run:
        check_target(out, (base, checkpoint, record.state.folder), force=force)
    with output.progress("scoring", len(record.state.views)) as advance:
        plan = plan_rollback(record, before, after, mode, advance)
    if out is not None and not dry_run:
        plan.check(share, strength)
    trouble = _elsewhere(plan, base, before)
    if trouble is not None and not json:
        output.line(trouble)
    # Before anything is written: folders that cannot be run must not cost a written checkpoint.
    nats = {"before": nats_per_token(base, texts, checkpoint), "after": nats_per_token(checkpoint, texts)}
    if dry_run or out is None:
        rows = plan.curve(strength)
    else:
        with output.progress("writing", len(record.state.views)) as advance:
            rows = [write_rollback(plan, share, strength, out, force=force, advance=advance)]
        nats["rolled back"] = nats_per_token(out, texts, checkpoint)
    measured = {name: {when: found[name] for when, found in nats.items()} for name in texts}
    if json:
        table = {"domain": domain, "mode": mode, "out": None if dry_run else str(out), "rollback": rows}
        table |= {"trouble": trouble} if trouble is not None else {}
        output.as_json(table | ({"nats_per_token": measured} if measured else {}))
        return
    cells = [
        [
            f"{100 * row['share']:.3g}%",
            f"{row['units']:.0f}",
            output.number(row["interference_left"], ".1%"),
            output.number(row["edit_left"], ".1%"),
        ]
        for row in rows
    ]
    columns = ["share of units", "units", "predicted interference left", "squared edit left"]
    output.table(f"Rollback for {domain}, strength {strength:g}, {mode}", columns, cells)
    if measured:
        cells = [[name, *(f"{value:.4f}" for value in found.values())] for name, found in measured.items()]
        output.table("Measured, nats per token", ["domain", "before", "after", "rolled back"], cells)
    if out is not None and not dry_run:
        output.line(f"Written to {out}")


def _elsewhere(plan: RollbackPlan, base: Path, before: Checkpoint) -> str | None:
    """What to say where BASE is not where the domain was anchored, or None."""
    from interference_guard.analysis.prediction import predict_interference, predict_rounding

    record = plan.record
    # A region that was moved lies elsewhere, and says nothing of where the domain was anchored.
    if record.details["renewed_at"]:
        return None
    with output.progress("placing BASE", len(record.state.views)) as advance:
        found = predict_interference(record, before, advance=advance).raw
    beyond = found - ASTRAY * plan.whole_interference
    if not beyond > 0 or beyond <= ROUNDING * predict_rounding(record, before).raw:
        return None
    where = (
        "where the run began" if record.details["reference"] else "the end of its last own, or recovery, phase"
    )
    return (
        f"{base} is not where {record.name!r} was last anchored, {record.details['foreign_steps']} steps before "
        f"the state was saved: there it is predicted to have lost {found:.2e}, and by the edit "
        f"{plan.whole_interference:.2e} (raw). The edit is best measured from {where}."
    )


def _files(data: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for entry in data:
        name, _, path = entry.partition("=")
        if not name or not path:
            raise ConfigError(f"--data {entry!r} is not NAME=FILE, for instance --data math=math.jsonl.")
        if name in found:
            raise ConfigError(f"--data names {name!r} twice. Give all rows of a domain in one file.")
        found[name] = Path(path)
    return found
