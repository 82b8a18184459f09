"""Collects the guard's metrics as plain numbers."""

from __future__ import annotations

import math
from time import perf_counter
from typing import TYPE_CHECKING

from .trust_region import Raw

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard

PARTS = ("retain", "observe", "anchor", "predict", "project", "probe", "metrics")


class Clock:
    """Wall-clock seconds of the guard by part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._reported = (0, 0.0)

    def add(self, part: str, started: float) -> float:
        """Add the time since `started`; returns the present time."""
        now = perf_counter()
        self.seconds[part] += now - started
        return now

    def take(self, steps: int) -> float | None:
        """Seconds per step since the last call, None without a step."""
        total = sum(self.seconds.values())
        (before, seconds), self._reported = self._reported, (steps, total)
        return (total - seconds) / (steps - before) if steps > before else None


def collect(guard: Guard) -> dict[str, float]:
    """All metrics that have a value now, by their names in `metrics.METRICS`; reads the device.

    Over several ranks all of them call it.
    """
    states = list(guard.domains.values())
    seen, table = guard.raw_parts(), _rollouts(guard)
    for state in states:
        values = _domain(state, seen.get(state.name, Raw(0.0, 0.0)))
        table |= {f"guard/{state.name}/{key}": value for key, value in values.items()}
    for index, a in enumerate(states):
        for b in states[index + 1 :]:
            if a.half_set is not None and b.half_set is not None:
                first, second = sorted((a.name, b.name))
                if (first, second) not in guard.overlaps:
                    guard.overlaps[first, second] = a.half_set.overlap(b.half_set)
                table[f"guard/overlap/{first}/{second}"] = guard.overlaps[first, second]
    if guard.config.recovery:
        schedule = guard.schedule
        table["guard/recovery/active"] = float(schedule.phase == "recovering")
        table["guard/recovery/steps"] = float(schedule.total)
        table["guard/recovery/failures"] = float(schedule.failures)
        if schedule.phases:
            table["guard/recovery/taken"] = float(schedule.taken)
            table["guard/recovery/expected"] = schedule.expected
    table["guard/update_kept"] = guard.kept.take()
    table["guard/seconds"] = guard.clock.take(guard.steps)
    return {name: value for name, value in table.items() if value is not None and math.isfinite(value)}


def _rollouts(guard: Guard) -> dict[str, float | None]:
    """Mean reward and length of each domain's rows since the last report, of all ranks."""
    # Rows of a domain whose steps are still to come may lie on some ranks alone: they wait.
    names = sorted(guard.domains if guard.ranks.reduce is None else guard.announced)
    means = {f"guard/{name}/reward": guard.domains[name].rewards for name in names}
    means |= {f"guard/{name}/length": guard.domains[name].lengths for name in names}
    if not means:
        return {}
    sums = guard.ranks.totals([value for mean in means.values() for value in mean.sums()], guard.device)
    for mean in means.values():
        mean.take()
    totals = zip(sums[::2], sums[1::2], strict=True)
    return {key: total / count if count else None for key, (total, count) in zip(means, totals, strict=True)}


def _domain(state: DomainState, raw: Raw) -> dict[str, float | None]:
    table: dict[str, float | None] = {}
    if state.protected_set is not None:
        table["protected_share"] = state.protected_set.share
    if not state.anchored:
        return table
    table["predicted"] = state.region.predict(raw)
    table["renewals"] = float(state.renewals)
    # Where nothing has moved yet both parts are rounding, and their quotient says nothing.
    noise = 0.0 if state.model is None else state.model.rounding().item()
    table["residual"] = raw.outside / raw.quadratic if raw.quadratic > noise else 0.0
    if state.radius is not None:
        radius = state.radius.item()
        table["radius"] = radius
        table["excess"] = max(raw.inside / radius - 1, 0.0)
    found = state.measurement
    if found is not None:
        table |= {"measured": found.loss, "kl": found.kl, "effective": found.effective}
        table |= {"token_ratio": float(found.ratio == "token"), "nats": float(state.region.unit == "nats")}
    if math.isfinite(state.true_reward) and math.isfinite(state.anchor_reward):
        table["forgetting"] = state.anchor_reward - state.true_reward
    elif found is not None and found.ratio != "nats" and state.span is not None:
        table["forgetting"] = found.loss * (state.span[1] - state.span[0])
    return table
