"""A run's history: JSON lines beside the checkpoints, of bounded length, that a report is drawn from.

The first line says what the run is. Each further line is one report of metrics (``"step"``), one evaluation
(``"evaluation"``), or the sums by layer and module so far (``"places"``), of which the latest counts. When more
than `limit` lines lie in the file, or more than `size` bytes, every second step line is dropped and from then on
only every second one is written, so that the whole run keeps one resolution. In a run of phases the lines on both
sides of a change of domain are written and kept all the same; where domains take turns, the one with fewer lines
goes first.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, StateError
from .files import HISTORY, replacing
from .recorded import VERSION, RecordedRun, find_history, outline, read_history
from .telling import warn
from .thinning import Key, Line, active_of, halved, has_phases, key_of

if TYPE_CHECKING:
    from .places import Places

__all__ = ["HISTORY", "History", "RecordedRun", "find_history", "read_history"]
LIMIT = 4000
# Bytes: with dozens of domains a line holds thousands of numbers, one for each pair of them.
SIZE = 32 << 20
# Of steps, however long they are, and of a whole file at least.
LEAST = 8
FAULTS = (OSError, TypeError, ValueError, StateError)


class History:
    """Writes a run's history. A fault of the disk ends the writing with one warning, never the run.

    A history that a resumed run finds damaged from end to end, or empty, is set aside with a warning, and a new
    one begins.

    Args:
        path: The file; lines already in it up to `step` are kept, later ones belong to steps that are
            about to be run again and are dropped.
        settings: The run's settings, for the first line; JSON-ready.
        step: Steps the run has done so far, above 0 where it resumes.
        limit: Most lines in the file, at least 8.
        size: Most bytes in the file, about, where more than 8 step lines lie in it.

    Raises:
        ConfigError: If `limit` is under 8.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any] | None = None,
        step: int = 0,
        limit: int = LIMIT,
        size: int = SIZE,
    ) -> None:
        if limit < LEAST:
            raise ConfigError(f"limit={limit!r} is not allowed: a history needs {LEAST} lines or more.")
        self.path = path
        self.limit = limit
        self.size = size
        self.failed = False
        self.stride = 1
        self._lines = 1
        self._bytes = 0
        # The newest report; the newest that is in the file; of those since then, the one to write next.
        self._latest: Line | None = None
        self._written: Line | None = None
        self._chosen: Line | None = None
        self._since = 0
        self._counts: Counter[Key] = Counter()
        self._phased = True
        self._settings = dict(settings or {})
        try:
            earlier = self._earlier(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite(earlier)
        except FAULTS as error:
            self._fail(error)

    def report(
        self, step: int, metrics: Mapping[str, float], *, active: Sequence[str], seconds: float = 0.0
    ) -> None:
        """Add a line of metrics.

        Args:
            step: The optimizer step they were reported at.
            metrics: Plain numbers by name.
            active: Domains that step trained.
            seconds: Wall-clock time since the run, or its resumed part, began.

        Raises:
            ConfigError: If `step` is no integer.
        """
        line: Line = {
            "kind": "step",
            "step": _step(step),
            "active": list(active),
            "seconds": round(seconds, 3),
            "metrics": _finite(metrics),
        }
        before, self._latest = self._latest, line
        if before is not None and self._phased and active_of(before) != active_of(line):
            # Where a phase ends must not depend on the stride.
            self._write(before)
            self._write(line)
            return
        self._since += 1
        # Of each stride the domains with the fewest lines: in step with their order, others would never be seen.
        if self._chosen is None or self._counts[key_of(line)] <= self._counts[key_of(self._chosen)]:
            self._chosen = line
        if self._since >= self.stride:
            self._write(self._chosen)

    def evaluation(self, step: int, rewards: Mapping[str, float], *, active: Sequence[str] | None = None) -> None:
        """Add an evaluation.

        Args:
            step: Steps done.
            rewards: Mean reward, or pass rate, by domain.
            active: Domains that this step trained (`Guard.trained`), so that the evaluation is of the right
                phase; by default those of the latest report.

        Raises:
            ConfigError: If `step` is no integer.
        """
        if active is None:
            active = active_of(self._latest or {})
        line: dict[str, Any] = {"kind": "evaluation", "step": _step(step)}
        if active:
            line["active"] = list(active)
        self._append({**line, "rewards": _finite(rewards)})

    def places(self, step: int, places: Mapping[str, Mapping[str, Places]]) -> None:
        """Add what `Guard.places` returned; only the latest is read, so that of a run's end is enough.

        The latest report is written before it, if the stride left it out: it is how the run ended.

        Args:
            step: Steps done.
            places: Tables by domain, by name.

        Raises:
            ConfigError: If `step` is no integer.
        """
        step = _step(step)
        tables = {
            name: {
                domain: [[layer, module, _number(value)] for (layer, module), value in table.items()]
                for domain, table in by_domain.items()
            }
            for name, by_domain in places.items()
        }
        if self._latest is not None:
            self._write(self._latest)
        self._append({"kind": "places", "step": step, "places": tables})

    def _earlier(self, step: int) -> list[Line]:
        if step <= 0 or not self.path.is_file():
            return []
        try:
            found = outline(self.path)
        except StateError as error:
            self._set_aside(error)
            return []
        if found.version > VERSION:
            # Rewritten, it would lose what this release does not know.
            self._set_aside(StateError(found.notes[0]))
            return []
        self.stride = found.stride
        # The sums will be written again when the run ends.
        lines: list[Line] = [line for line in found.lines if line["step"] <= step and line["kind"] != "places"]
        self._note([line for line in lines if line["kind"] == "step"])
        return lines

    def _set_aside(self, error: StateError) -> None:
        names = (f"{self.path.name}.damaged{count or ''}" for count in itertools.count())
        aside = next(place for name in names if not (place := self.path.with_name(name)).exists())
        os.replace(self.path, aside)
        warn(f"The guard's history could not be read: {error} It lies in {aside} now, and a new one begins.")

    def _note(self, steps: Sequence[Line]) -> None:
        """Take in which step lines lie in the file."""
        self._counts = Counter(map(key_of, steps))
        self._phased = has_phases(steps)
        if self._latest is None and steps:
            self._latest = self._written = steps[-1]

    def _write(self, line: Line) -> None:
        """Append a step line, unless it was the last one that was."""
        if line is self._written:
            return
        self._written, self._chosen, self._since = line, None, 0
        self._counts[key_of(line)] += 1
        self._append(line)

    def _append(self, line: Line) -> None:
        if self.failed:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                self._bytes += file.write(_dumped(line))
            self._lines += 1
            if self._lines > self.limit or (self._bytes > self.size and self._counts.total() > LEAST):
                self._thin()
        except FAULTS as error:
            self._fail(error)

    def _thin(self) -> None:
        # Never all of the file at once: it may hold tens of megabytes, and their numbers many times that.
        lines = outline(self.path).lines
        steps: list[Line] = [line for line in lines if line["kind"] == "step"]
        others: list[Line] = [line for line in lines if line["kind"] == "evaluation"]
        last = [line for line in lines if line["kind"] == "places"][-1:]
        kept = [*steps, *others, *last]
        # Sums that are out of date may be most of it; without them there may be room again.
        if 2 * sum(line["size"] for line in kept) > self.size or 2 * len(kept) > self.limit:
            # A run of evaluations alone must be bounded too. The bytes are those of steps.
            if self._lines <= self.limit or len(steps) >= len(others):
                self.stride *= 2
                steps = halved(steps)
                self._note(steps)
            else:
                others = halved(others)
        self._rewrite(sorted([*steps, *others, *last], key=lambda line: int(line["step"])))

    def _rewrite(self, lines: Sequence[Line]) -> None:
        """Put a file with these lines of the present one, as `outline` gives them, in its place."""
        head = {"kind": "run", "version": VERSION, "stride": self.stride, "settings": self._settings}
        with replacing(self.path) as temporary, temporary.open("wb") as file:
            written = file.write(_dumped(head).encode())
            if lines:
                with self.path.open("rb") as source:
                    for line in lines:
                        source.seek(line["at"])
                        written += file.write(source.read(line["size"]) + b"\n")
        self._lines, self._bytes = 1 + len(lines), written

    def _fail(self, error: Exception) -> None:
        self.failed = True
        advice = (
            "free space or choose another output folder to have one"
            if isinstance(error, OSError)
            else "to have one, see that settings and names can be written as JSON, and nothing else writes there"
        )
        warn(
            f"The guard's history {self.path} cannot be written: {error}. Training goes on without it; {advice}."
        )


def _step(step: int) -> int:
    """A step as Python's own integer: JSON holds none of NumPy's or torch's."""
    try:
        return operator.index(step)
    except TypeError as error:
        raise ConfigError(
            f"step={step!r} is not allowed: it must be an integer, the number of steps done."
        ) from error


def _finite(values: Mapping[str, Any]) -> dict[str, float | None]:
    """What can be read as a number, those of NumPy and torch too, by name."""
    numbers = {name: _read(value) for name, value in values.items() if not isinstance(value, str)}
    return {name: _number(value) for name, value in numbers.items() if value is not None}


def _read(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _number(value: float) -> float | None:
    """JSON knows neither NaN nor infinity; six digits are more than a figure shows."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _dumped(line: Line) -> str:
    return json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
