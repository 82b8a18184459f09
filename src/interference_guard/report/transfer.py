"""The accuracy matrix of a sequence of phases, and what the continual-learning literature reads from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .run import Run, Series


@dataclass
class Transfer:
    """Evaluations after each phase.

    Args:
        phases: Domain of each phase, in order; each domain counts at its last phase.
        rows: Reward of every domain after each phase, ``rows[phase][domain]``.
        start: Reward before the first phase, empty where it was not evaluated.
        acc: Mean reward after the last phase.
        bwt: Mean change from a domain's own phase to the end, over all but the last (backward transfer).
        fwt: Mean change of a domain from the start to just before its own phase (forward transfer), or None.
        forgetting: Mean of a domain's best reward after any phase, from its own on, minus its last.
        by_domain: The same by domain.
    """

    phases: list[str]
    rows: list[dict[str, float]]
    start: dict[str, float]
    acc: float
    bwt: float
    fwt: float | None
    forgetting: float
    by_domain: dict[str, float]


def transfer(run: Run) -> Transfer | None:
    """Read the accuracy matrix, or None where evaluations after the phases are missing.

    Reference:
        Lopez-Paz and Ranzato, 2017, arXiv:1706.08840, for ACC, BWT and FWT; Chaudhry et al., 2018,
        arXiv:1801.10112, for forgetting.
    """
    phases = [phase for phase in run.phases if len(phase.active) == 1]
    if not run.evaluations or len(phases) < 2 or len(phases) != len(run.phases):
        return None
    rows: list[dict[str, float]] = []
    for index, phase in enumerate(phases):
        end = phases[index + 1].first if index + 1 < len(phases) else run.last
        row = {name: at(points, phase.first, end) for name, points in run.evaluations.items()}
        rows.append({name: value for name, value in row.items() if value is not None})
    names = [phase.active[0] for phase in phases]
    own = {name: index for index, name in enumerate(names) if name in rows[index]}
    end_row = rows[-1]
    if not own or not end_row:
        return None
    start = {name: points[0][1] for name, points in run.evaluations.items() if points[0][0] <= phases[0].first}
    earlier = [name for name in own if own[name] < len(rows) - 1 and name in end_row]
    changes = [end_row[name] - rows[own[name]][name] for name in earlier]
    lost = {name: max(row[name] for row in rows[own[name] :] if name in row) - end_row[name] for name in earlier}
    ahead = [
        rows[index - 1][name] - start[name]
        for index, name in enumerate(names)
        if index and names.index(name) == index and name in start and name in rows[index - 1]
    ]
    return Transfer(
        names,
        rows,
        start,
        sum(end_row.values()) / len(end_row),
        sum(changes) / max(len(changes), 1),
        sum(ahead) / len(ahead) if ahead else None,
        sum(lost.values()) / max(len(lost), 1),
        lost,
    )


def at(points: Series, first: float, last: float) -> float | None:
    """The last value in the steps after `first` up to `last`."""
    inside = [value for step, value in points if first < step <= last]
    return inside[-1] if inside else None


def losses(run: Run) -> dict[str, float]:
    """What each domain has lost that was followed by another one, in reward.

    Domain by domain: by its evaluations where there is one of its own training and one since that ended, else by
    the guard's own figure, or by the evaluations since where they show more: the first of them may come after the
    loss. A domain without either is missing.
    """
    found = transfer(run)
    lost: dict[str, float] = {}
    for name in run.domains:
        if found is not None and name in found.by_domain:
            lost[name] = found.by_domain[name]
        elif run.followed(name) or run.interleaved:
            values = [_evaluated(run, name)]
            if values[0] is None or not _evaluated_in_time(run, name):
                values.append(run.current(name, "forgetting"))
            if known := [value for value in values if value is not None]:
                lost[name] = max(known)
    return lost


def _evaluated_in_time(run: Run, name: str) -> bool:
    """Whether an evaluation shows what the domain had when its own training ended."""
    if run.interleaved or not run.followed(name):
        return True
    begin, end = _own_begin(run, name), run.own_end(name)
    return any(begin < step <= end for step, _ in run.evaluations.get(name, []))


def _own_begin(run: Run, name: str) -> float:
    """Where a domain's last phase began; minus infinity where it had none."""
    return max((phase.first for phase in run.planned if name in phase.active), default=-math.inf)


def _evaluated(run: Run, name: str) -> float | None:
    """Best evaluation minus the last one, or None where the last one is not newer than the own training."""
    points = run.evaluations.get(name, [])
    if not points or not run.planned:
        return None
    if run.interleaved or not run.followed(name):
        # One alone, such as that before the first step, has nothing to be compared with.
        if len(points) < 2:
            return None
        return max(value for _, value in points) - points[-1][1]
    end = run.own_end(name)
    if points[-1][0] <= end:
        return None
    # Before its own phase there was less to lose.
    return max(value for step, value in points if step > _own_begin(run, name)) - points[-1][1]
