"""The phases of a run: which domains were trained from which step to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interference_guard.thinning import active_of

Line = Mapping[str, Any]
Active = tuple[str, ...]


@dataclass(frozen=True)
class Phase:
    """A stretch of steps that trained the same domains."""

    first: float
    last: float
    active: Active

    @property
    def name(self) -> str:
        """The domains, as a label."""
        return " + ".join(self.active) if len(self.active) <= 2 else f"{len(self.active)} domains"


def planned(reports: Sequence[Line], evaluations: Sequence[Line]) -> list[Phase]:
    """The planned phases; a recovery interrupts one and does not end it.

    A phase ends at its last report, or at a later evaluation that says it was still trained: reports are made
    every few steps, and an evaluation right after a phase must not be counted to the next one.

    Args:
        reports: Lines with metrics, by step.
        evaluations: Lines with an evaluation; those of older versions do not say what was trained.
    """
    lines = [*zip(reports, recovering(reports), strict=True), *((line, False) for line in evaluations)]
    trained: list[Line] = []
    found: list[Active] = []
    for line, recovers in sorted(lines, key=lambda item: float(item[0]["step"])):
        active = active_of(line)
        if "rewards" in line and (not active or (active in found and active != found[-1])):
            # Of a recovery, or said of the report before: an evaluation makes a phase longer, never a second one.
            continue
        trained.append(line)
        found.append(found[-1] if recovers and active in found else active)
    return [Phase(*item) for item in stretches(trained, found)]


def recoveries(reports: Sequence[Line]) -> list[Phase]:
    """Stretches of recovery steps."""
    keys = [*zip(recovering(reports), map(active_of, reports), strict=True)]
    found = stretches(reports, keys)
    return [Phase(first, last, active) for first, last, (recovers, active) in found if recovers]


def recovering(reports: Sequence[Line]) -> list[bool]:
    """Whether each report holds recovery steps: their count has grown.

    The flag ``guard/recovery/active`` says what comes next: the step before a phase has it, its last step not.
    """
    found: list[bool] = []
    before = 0.0
    for line in reports:
        total = float(line["metrics"].get("guard/recovery/steps") or 0.0)
        # A history may begin in the middle of a run.
        found.append(bool(found) and total > before)
        before = total
    return found


def stretches(lines: Sequence[Line], keys: Sequence[Any]) -> list[tuple[float, float, Any]]:
    """First step, last step and key of neighbouring lines of one key; a line is of the steps before it."""
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
