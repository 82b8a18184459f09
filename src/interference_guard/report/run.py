"""A run's history as the figures need it: series by domain, phases, and evaluations after each phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from interference_guard.errors import GuardError, ReportError
from interference_guard.files import DETAILS
from interference_guard.history import RecordedRun, find_history, read_history

if TYPE_CHECKING:
    from interference_guard.places import Places

Made = TypeVar("Made")
# More changes of domain than this are an interleaved run: shading them would be a blur.
PHASE_LIMIT = 60
# What a domain's metrics are called after "guard/<domain>/".
OWN = ("predicted", "measured", "kl", "radius", "reward", "forgetting", "protected_share", "excess", "residual")
Series = list[tuple[float, float]]


@dataclass(frozen=True)
class Phase:
    """A stretch of steps that trained the same domains."""

    first: float
    last: float
    active: tuple[str, ...]

    @property
    def name(self) -> str:
        """The domains, as a label."""
        return " + ".join(self.active) if len(self.active) <= 2 else f"{len(self.active)} domains"


@dataclass
class Run:
    """A run as read from its history.

    Args:
        path: The history file.
        recorded: What was read.
    """

    path: Path
    recorded: RecordedRun

    def __post_init__(self) -> None:
        self._made: dict[str, Any] = {}
        self.series: dict[str, Series] = {}
        for line in self.recorded.steps:
            for name, value in line["metrics"].items():
                if value is not None:
                    self.series.setdefault(name, []).append((line["step"], value))
        self.evaluations: dict[str, Series] = {}
        for line in self.recorded.evaluations:
            for name, value in line["rewards"].items():
                if value is not None:
                    self.evaluations.setdefault(name, []).append((line["step"], value))
        names: list[str] = []
        for line in self.recorded.steps:
            names += [str(name) for name in line.get("active", ()) if str(name) not in names]
        # Evaluated domains that were never trained come last.
        names += [name for name in self.evaluations if name not in names]
        self.domains = names
        steps = self.recorded.steps
        recovering = _recovering(steps)
        self.phases = _phases(steps, recovering)
        trained = [_active(line) for line in steps]
        found = _stretches(steps, list(zip(recovering, trained, strict=True)))
        self.recoveries = [Phase(first, last, active) for first, last, (recovers, active) in found if recovers]

    def once(self, key: str, make: Callable[[], Made]) -> Made:
        """What `make` returns, computed at the first call with this key: figures are drawn in two widths."""
        if key not in self._made:
            self._made[key] = make()
        found: Made = self._made[key]
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """The guard's settings."""
        return self.recorded.settings

    @cached_property
    def last(self) -> float:
        """The last step that was reported or evaluated."""
        return float(max(line["step"] for line in self.recorded.lines))

    def metric(self, domain: str, name: str) -> Series:
        """A domain's metric over steps."""
        return self.series.get(f"guard/{domain}/{name}", [])

    def rates(self) -> tuple[dict[str, Series], str]:
        """Evaluated rewards where there are any, else the training rewards; and which of the two."""
        if self.evaluations:
            return self.evaluations, "evaluated reward"
        return {name: self.metric(name, "reward") for name in self.domains}, "training reward"

    def overlaps(self) -> dict[tuple[str, str], float]:
        """Last Jaccard index of each pair of protected sets; pairs as the names are listed."""
        found = {}
        for index, a in enumerate(self.domains):
            for b in self.domains[index + 1 :]:
                first, second = sorted((a, b))
                values = self.series.get(f"guard/overlap/{first}_{second}")
                if values:
                    found[a, b] = values[-1][1]
        return found

    def overhead(self) -> list[tuple[float, float, float]]:
        """Per report: step, the guard's seconds a step, all seconds a step."""
        found, before = [], None
        for line in self.recorded.steps:
            guard = line["metrics"].get("guard/seconds")
            now = (line["step"], float(line.get("seconds", 0.0)))
            # A resumed run counts its seconds from 0 again.
            if before is not None and now[0] > before[0] and now[1] > before[1] and guard is not None:
                found.append((now[0], float(guard), (now[1] - before[1]) / (now[0] - before[0])))
            before = now
        return found


def read_run(run: Path) -> Run:
    """Read a run's history.

    Raises:
        StateError: If there is none or it is damaged from end to end.
        ReportError: If the run has not logged anything yet.
    """
    path = find_history(run)
    recorded = read_history(path)
    if not recorded.lines:
        raise ReportError(
            f"{path} holds no step yet: the run is empty. Come back after its first log (logging_steps)."
        )
    return Run(path, recorded)


def find_state(run: Path) -> Path | None:
    """The newest folder at or under a run that holds a guard's state, or None."""
    folder = run if run.is_dir() else run.parent
    found = [path.parent for path in (folder / DETAILS, *folder.glob(f"*/{DETAILS}")) if path.is_file()]
    return max(found, key=lambda path: (path / DETAILS).stat().st_mtime, default=None)


def read_places(run: Run, state: Path | None) -> tuple[dict[str, dict[str, Places]], str | None]:
    """Where curvature and projections sit: from a saved state, or as the run's history has it from its end.

    Args:
        run: The run.
        state: A folder with the guard's state, which goes first; None to look in the history, then for the
            newest state under the run.

    Returns:
        Tables by domain, ``"curvature"`` and ``"projected"``, and what was wrong with a state that could not be
        read.
    """
    if state is None and run.recorded.places:
        return run.recorded.places, None
    state = state if state is not None else find_state(run.path)
    if state is None:
        return {}, None
    # Here, because it imports torch.
    from interference_guard.analysis.state import StateFile

    try:
        records = StateFile(state).domains
        curvature = {name: record.curvature_places() for name, record in records.items()}
        projected = {name: record.projected_places() for name, record in records.items()}
        tables = {"curvature": curvature, "projected": {name: item for name, item in projected.items() if item}}
    except GuardError as error:
        return {}, str(error)
    return tables, None


def _active(line: dict[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, line.get("active", ())))


def _recovering(lines: list[dict[str, Any]]) -> list[bool]:
    """Whether each report holds recovery steps: their count has grown.

    The flag ``guard/recovery/active`` says what comes next: the step before a phase has it, its last step not.
    """
    found: list[bool] = []
    before = 0.0
    for line in lines:
        total = float(line["metrics"].get("guard/recovery/steps") or 0.0)
        # A history may begin in the middle of a run.
        found.append(bool(found) and total > before)
        before = total
    return found


def _phases(lines: list[dict[str, Any]], recovering: list[bool]) -> list[Phase]:
    """The planned phases; a recovery interrupts one and does not end it."""
    planned: list[tuple[str, ...]] = []
    for line, recovers in zip(lines, recovering, strict=True):
        active = _active(line)
        planned.append(planned[-1] if recovers and active in planned else active)
    found = [Phase(*item) for item in _stretches(lines, planned)]
    return found if len(found) <= PHASE_LIMIT else []


def _stretches(lines: list[dict[str, Any]], keys: list[Any]) -> list[tuple[float, float, Any]]:
    """First step, last step and key of neighbouring reports of one key; a report is of the steps before it."""
    found: list[tuple[float, float, Any]] = []
    current, begin, last = None, 0.0, 0.0
    for line, here in zip(lines, keys, strict=True):
        if here != current and last > begin:
            found.append((begin, last, current))
            begin = last
        current, last = here, float(line["step"])
    if last > begin:
        found.append((begin, last, current))
    return found
