"""`report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder (output_dir), or its history file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; RUN/report.html by default.")] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint with the guard's state, for the maps by layer and module; by default the "
            "history's own, else the latest state under RUN."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing report.")] = False,
) -> None:
    """Write one self-contained HTML page, and each figure as PNG and SVG.

    Example: interference-guard report outputs/run -o report.html
    """
    from interference_guard.report.page import build_report

    made = build_report(run, out, state=state, force=force)
    output.notes(made.notes)
    output.line(f"{made.page}  ({made.page.stat().st_size / 1e6:.1f} MB)")
    output.line(f"{len(made.figures)} figures in {made.page.with_suffix('')}")
