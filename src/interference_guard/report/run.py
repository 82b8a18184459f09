"""A run's history as the figures need it: series by domain, phases, and evaluations after each phase."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from interference_guard.checkpoint import DETAILS
from interference_guard.errors import GuardError, ReportError
from interference_guard.history import RecordedRun, find_history, read_history

# More changes of domain than this are an interleaved run: shading them would be a blur.
PHASE_LIMIT = 60
# What a domain's metrics are called after "guard/<domain>/".
OWN = ("predicted", "measured", "kl", "radius", "reward", "forgetting", "protected_share", "excess", "residual")
Series = list[tuple[float, float]]


@dataclass(frozen=True)
class Phase:
    """A stretch of steps that trained the same domains; `recovery` where the guard asked for it."""

    first: float
    last: float
    active: tuple[str, ...]
    recovery: bool = False

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
        self.phases = _phases(self.recorded.steps)
        self.recoveries = [
            Phase(phase.first, phase.last, phase.active, True)
            for phase in _stretches(self.recorded.steps, lambda line: bool(_recovers(line)))
            if phase.recovery
        ]

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


def curvature_map(state: Path) -> tuple[dict[str, dict[tuple[int, str], float]], str | None]:
    """Share of each domain's curvature energy by layer and module; layer -1 is outside the layers.

    Returns:
        The shares by domain, and what was wrong where the state could not be read.
    """
    from interference_guard.analysis.checkpoints import place
    from interference_guard.analysis.state import StateFile

    try:
        found: dict[str, dict[tuple[int, str], float]] = {}
        for name, record in StateFile(state).domains.items():
            table: dict[tuple[int, str], float] = {}
            for parameter, energy in record.energies().items():
                layer, module = place(parameter)
                key = (-1 if layer is None else layer, module)
                table[key] = table.get(key, 0.0) + float(energy.double().sum())
            total = sum(table.values())
            if total > 0:
                found[name] = {key: value / total for key, value in table.items()}
    except GuardError as error:
        return {}, str(error)
    return found, None


def _recovers(line: dict[str, Any]) -> float:
    return float(line["metrics"].get("guard/recovery/active") or 0.0)


def _phases(lines: list[dict[str, Any]]) -> list[Phase]:
    found = _stretches(lines, lambda line: tuple(line.get("active", ())))
    return found if len(found) <= PHASE_LIMIT else []


def _stretches(lines: list[dict[str, Any]], key: Any) -> list[Phase]:
    """Neighbouring reports of one key; a report stands for the steps since the one before."""
    found: list[Phase] = []
    current, begin, last = None, 0.0, 0.0
    active: tuple[str, ...] = ()
    for line in lines:
        here = key(line)
        if here != current and last > begin:
            found.append(Phase(begin, last, active, current is True))
            begin = last
        current, active, last = here, tuple(map(str, line.get("active", ()))), float(line["step"])
    if last > begin:
        found.append(Phase(begin, last, active, current is True))
    return found
