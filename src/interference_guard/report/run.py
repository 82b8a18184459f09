"""A run's history as the figures need it: series by domain, phases, and evaluations after each phase."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from interference_guard.errors import GuardError, ReportError
from interference_guard.files import DETAILS
from interference_guard.history import RecordedRun, find_history, read_history
from interference_guard.metrics import METRICS
from interference_guard.thinning import active_of

from .phases import planned, recoveries

if TYPE_CHECKING:
    from interference_guard.places import Places

Made = TypeVar("Made")
# More changes of domain than this are an interleaved run: shading them would be a blur.
PHASE_LIMIT = 60
# Folders of the states of other ranks than the first.
LATER = re.compile(r"_rank[1-9]\d*$")
# What a domain's metrics are called after "guard/<domain>/".
OWN = frozenset(name.rpartition("/")[2] for name in METRICS if name.startswith("guard/<domain>/"))
Series = list[tuple[float, float]]


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
        logged: dict[str, None] = {}
        reports = sorted(self.recorded.steps, key=lambda line: float(line["step"]))
        for line in reports:
            for name, value in line["metrics"].items():
                logged[name] = None
                if value is not None:
                    self.series.setdefault(name, []).append((line["step"], value))
        self.evaluations: dict[str, Series] = {}
        for line in self.recorded.evaluations:
            for name, value in line["rewards"].items():
                if value is not None:
                    self.evaluations.setdefault(name, []).append((line["step"], value))
        trained = dict.fromkeys(name for line in self.recorded.lines for name in active_of(line))
        # Reference domains are never trained, and a report every few steps may miss one that is.
        seen = dict.fromkeys(name for key in logged if (name := domain_of(key)) is not None)
        self.guarded = {**trained, **seen}
        # Evaluated domains that were never trained come last.
        self.domains = list({**self.guarded, **dict.fromkeys(self.evaluations)})
        self.planned = planned(reports, self.recorded.evaluations)
        self.phases = [] if self.interleaved else self.planned
        self.recoveries = recoveries(reports)

    @property
    def interleaved(self) -> bool:
        """Whether domains take turns, so that no phase of one is worth a name."""
        return len(self.planned) > PHASE_LIMIT

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

    @cached_property
    def reach(self) -> float:
        """The last step that a state of this run can be of, by how far apart its lines are.

        A run may save between two reports; by the time of the next one there would have been a line.
        """
        steps = sorted({line["step"] for line in self.recorded.lines})
        if len(steps) > 1:
            return self.last + float(max(later - step for step, later in pairwise(steps)))
        # An evaluation before the first step says nothing of when a report is due.
        return 2 * self.last or math.inf

    def metric(self, domain: str, name: str) -> Series:
        """A domain's metric over steps."""
        return self.series.get(f"guard/{domain}/{name}", [])

    def own_end(self, domain: str) -> float:
        """Where a domain's last phase ended; minus infinity where it had none."""
        return max((phase.last for phase in self.planned if domain in phase.active), default=-math.inf)

    def followed(self, domain: str) -> bool:
        """Whether a trained or guarded domain was followed by others, so that it may have lost something."""
        return domain in self.guarded and bool(self.planned) and domain not in self.planned[-1].active

    def current(self, domain: str, name: str) -> float | None:
        """The last value of a domain's metric, or None where its own training has gone on since.

        What was lost before is not logged any more then. Where domains take turns the last value stands: it is
        as new as the others' turns are.
        """
        points = self.metric(domain, name)
        if not points or (not self.interleaved and points[-1][0] <= self.own_end(domain)):
            return None
        return points[-1][1]

    def in_nats(self, domain: str) -> bool:
        """Whether a domain's interference was last measured in nats per token.

        Older histories do not say, and count as parts of the reward range.
        """
        points = self.metric(domain, "nats")
        return bool(points) and points[-1][1] > 0

    def rates(self) -> tuple[dict[str, Series], dict[str, str]]:
        """Rewards by domain, and of which kind each domain's are.

        A domain that was evaluated has its evaluated rewards, another one those of its training; one without
        either is missing.
        """
        training = {name: points for name in self.domains if (points := self.metric(name, "reward"))}
        kinds = dict.fromkeys(training, "training") | dict.fromkeys(self.evaluations, "evaluated")
        return {**training, **self.evaluations}, kinds

    def overlaps(self) -> dict[tuple[str, str], float]:
        """Last Jaccard index of each pair of protected sets; pairs as the names are listed."""
        found = {}
        for index, a in enumerate(self.domains):
            for b in self.domains[index + 1 :]:
                first, second = sorted((a, b))
                values = self.series.get(f"guard/overlap/{first}/{second}")
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
        ReportError: If the run has not logged or evaluated anything yet.
    """
    path = find_history(run)
    recorded = read_history(path)
    # The sums by layer and module that a run ends with say nothing of any step.
    if not recorded.steps and not recorded.evaluations:
        raise ReportError(
            f"{path} holds no step yet: the run is empty. Come back after its first log, or, where the run has "
            "ended, log in the next one (logging_steps below its length)."
        )
    return Run(path, recorded)


def find_state(run: Path, reach: float = math.inf) -> Path | None:
    """The folder of the latest state at or under a run, the first rank's; None without any.

    The latest is that of the most steps, at most `reach`, and of several the newest file: copies are of any age.
    """
    if not run.exists():
        return None
    folder = run if run.is_dir() else run.parent
    # TRL's checkpoints lie right in a run's folder, veRL's in folders by rank below one for each model.
    places = ("", "*/", "actor/*/", "global_step_*/actor/*/")
    found = [
        (steps, path.stat().st_mtime, path.parent)
        for place in places
        for path in folder.glob(place + DETAILS)
        if not LATER.search(path.parent.name) and (steps := _steps(path)) <= reach
    ]
    return max(found)[-1] if found else None


def own_state(run: Run) -> tuple[Path | None, str | None]:
    """The folder of the latest state that a run's history reaches, and a sentence on a later one beside it.

    A run that was begun anew in the folder of another one leaves the other's checkpoints there.
    """
    latest, own = find_state(run.path), find_state(run.path, run.reach)
    if latest is None or latest == own:
        return own, None
    return own, (
        f"The state in {latest} is left out: it is of step {_steps(latest / DETAILS)}, and the history ends at "
        f"step {run.last:g}. Most likely a former run left it in the same folder, or the history could not be "
        "written to its end. To see it, inspect that folder."
    )


def _steps(details: Path) -> int:
    """The steps that a state says it has; less than any where it is damaged."""
    try:
        steps = json.loads(details.read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return -1
    return steps if isinstance(steps, int) else -1


def read_places(run: Run, state: Path | None) -> tuple[dict[str, dict[str, Places]], list[str]]:
    """Where curvature and projections sit: from a saved state, or as the run's history has it from its end.

    Args:
        run: The run.
        state: A folder with the guard's state, which goes first; None to look in the history, then for the
            latest state under the run that the history reaches.

    Returns:
        Tables by domain, ``"curvature"`` and ``"projected"``, and sentences on states that were found and are
        not used.

    Raises:
        GuardError: If a state that was given cannot be read.
    """
    given = state is not None
    if not given and run.recorded.places:
        return run.recorded.places, []
    notes = []
    if state is None:
        state, former = own_state(run)
        notes = [former] if former is not None else []
    if state is None:
        return {}, notes
    # Here, because it imports torch.
    from interference_guard.analysis.state import StateFile

    try:
        records = StateFile(state).domains
        curvature = {name: record.curvature_places() for name, record in records.items()}
        projected = {name: record.projected_places() for name, record in records.items()}
        tables = {"curvature": curvature, "projected": {name: item for name, item in projected.items() if item}}
    except GuardError as error:
        if given:
            raise
        return {}, [*notes, f"No maps by layer and module: {error}"]
    return tables, notes


def domain_of(metric: str) -> str | None:
    """The domain a metric is of, or None for the guard's own and for the host's.

    >>> domain_of("guard/openai/gsm8k/measured"), domain_of("guard/recovery/steps"), domain_of("loss")
    ('openai/gsm8k', None, None)
    """
    name, _, own = metric.removeprefix("guard/").rpartition("/")
    # The pair of a domain that is called like a metric.
    pair = name.startswith("overlap/")
    return name if metric.startswith("guard/") and name and own in OWN and not pair else None
