"""Reads the history of a run that `History` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import StateError
from .files import HISTORY

if TYPE_CHECKING:
    from .places import Places

# Of what is written; a later one may hold kinds of lines that this one does not know.
VERSION = 1


@dataclass
class RecordedRun:
    """What `read_history` found.

    Args:
        settings: Settings of the first line.
        lines: Step and evaluation lines in the file's order.
        skipped: Lines that could not be read.
        stride: Reports behind one step line.
        version: Of the format, as the first line has it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    stride: int = 1
    version: int = VERSION

    @property
    def notes(self) -> list[str]:
        """Sentences on what the file holds and this does not."""
        found = []
        if self.version > VERSION:
            found.append(
                f"The history has format version {self.version}, and this release knows {VERSION}: it may "
                "hold more than is shown. Install the release of interference-guard that wrote it."
            )
        elif self.skipped:
            lines = "line of the history was" if self.skipped == 1 else "lines of the history were"
            found.append(f"{self.skipped} damaged {lines} skipped.")
        return found

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Lines with metrics."""
        return [line for line in self.lines if line["kind"] == "step"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines with an evaluation."""
        return [line for line in self.lines if line["kind"] == "evaluation"]

    @property
    def places(self) -> dict[str, dict[str, Places]]:
        """The sums by layer and module, as `Guard.places` returned them; empty where the run has not ended."""
        found: dict[str, dict[str, Places]] = {}
        for line in self.lines:
            if line["kind"] == "places":
                found = {
                    name: {
                        domain: {(layer, module): float(value or 0.0) for layer, module, value in rows}
                        for domain, rows in table.items()
                    }
                    for name, table in line["places"].items()
                }
        return found


def find_history(run: Path) -> Path:
    """The history file of a run, given the run's folder or the file.

    Raises:
        StateError: If there is none.
    """
    path = run / HISTORY if run.is_dir() else run
    if not path.is_file():
        raise StateError(
            f"{run} has no guard history ({HISTORY}). Give the folder a guarded run wrote its checkpoints to "
            "(output_dir), or the history file itself."
        )
    return path


def read_history(path: Path) -> RecordedRun:
    """Read a history; damaged lines are skipped and counted.

    Raises:
        StateError: If the file cannot be read, or no line of it is one of a history.
    """
    return _read(path, lambda line, at, size: line)


def outline(path: Path) -> RecordedRun:
    """Read a history without its numbers, which may be many: of each line what says whether it stays.

    Returns:
        Lines with their ``kind``, ``step``, ``active`` domains and the names in ``rewards``, and where they lie
        in the file: ``at`` which byte, and how many (``size``), without the line's end.

    Raises:
        StateError: If the file cannot be read, or no line of it is one of a history.
    """
    return _read(path, _outlined)


def _outlined(line: dict[str, Any], at: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {key: line[key] for key in ("kind", "step", "active") if key in line}
    if "rewards" in line:
        found["rewards"] = dict.fromkeys(line["rewards"])
    return found | {"at": at, "size": size}


def _read(path: Path, keep: Callable[[dict[str, Any], int, int], dict[str, Any]]) -> RecordedRun:
    """A history, line by line; `keep` is given each line, where it lies and its size, and says what is kept."""
    found = RecordedRun()
    headed, at = False, 0
    try:
        with path.open("rb") as file:
            for raw in file:
                line = _parsed(raw.decode(errors="replace"))
                if line is None:
                    found.skipped += bool(raw.strip())
                elif line["kind"] == "run":
                    headed = True
                    found.settings = line["settings"]
                    found.stride = line["stride"]
                    found.version = line.get("version", VERSION)
                else:
                    found.lines.append(keep(line, at, len(raw.rstrip())))
                at += len(raw)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error}. Check the path and its permissions.") from error
    if not found.lines and not headed:
        what = f"none of its {found.skipped} lines could be read" if found.skipped else "it is empty"
        raise StateError(
            f"{path} is no guard history: {what}. Give a file named {HISTORY} that a guarded run wrote."
        )
    return found


def _parsed(raw: str) -> dict[str, Any] | None:
    """A line as a table with the fields its kind must have, else None."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    kind, step = line.get("kind"), line.get("step")
    if kind == "run":
        settings, stride = line.get("settings"), line.get("stride")
        known = isinstance(settings, dict) and isinstance(line.get("version", VERSION), int)
        return line if known and isinstance(stride, int) and stride > 0 else None
    if kind == "places":
        return line if isinstance(step, int) and _are_places(line.get("places")) else None
    table = line.get({"step": "metrics", "evaluation": "rewards"}.get(str(kind), ""))
    if not isinstance(step, int) or isinstance(step, bool) or not isinstance(table, dict):
        return None
    numbers = all(isinstance(value, int | float) for value in table.values() if value is not None)
    seconds = line.get("seconds", 0.0)
    if not numbers or not isinstance(seconds, int | float) or not isinstance(line.get("active", []), list):
        return None
    return line


def _are_places(tables: Any) -> bool:
    try:
        rows = [row for table in tables.values() for rows in table.values() for row in rows]
        return all(
            isinstance(layer, int | None) and isinstance(module, str) and isinstance(value, int | float | None)
            for layer, module, value in rows
        )
    except (AttributeError, TypeError, ValueError):
        return False
