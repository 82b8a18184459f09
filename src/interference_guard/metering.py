"""Collects the guard's metrics as plain numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard


def collect(guard: Guard) -> dict[str, float]:
    """All metrics that have a value now, by their names in `metrics.METRICS`; reads the device."""
    table: dict[str, float | None] = {}
    states = list(guard.domains.values())
    seen = guard.interference()
    for state in states:
        values = _domain(state, *seen.get(state.name, (0.0, 0.0)))
        table |= {f"guard/{state.name}/{key}": value for key, value in values.items()}
    for index, a in enumerate(states):
        for b in states[index + 1 :]:
            if a.half_set is not None and b.half_set is not None:
                first, second = sorted((a.name, b.name))
                if (first, second) not in guard.overlaps:
                    guard.overlaps[first, second] = a.half_set.overlap(b.half_set)
                table[f"guard/overlap/{first}_{second}"] = guard.overlaps[first, second]
    table["guard/update_kept"] = guard.take_kept()
    table["guard/seconds"] = guard.take_seconds()
    return {name: value for name, value in table.items() if value is not None and math.isfinite(value)}


def _domain(state: DomainState, subspace: float, residual: float) -> dict[str, float | None]:
    table: dict[str, float | None] = {"reward": state.rewards.take(), "length": state.lengths.take()}
    if state.protected_set is not None:
        table["protected_share"] = state.protected_set.share
    if not state.anchored:
        return table
    table["predicted"] = state.region.predict(subspace + residual)
    table["residual"] = residual / (subspace + residual) if subspace + residual > 0 else 0.0
    if state.radius is not None:
        radius = state.radius.item()
        table["radius"] = radius
        table["excess"] = max(subspace / radius - 1, 0.0)
    found = state.measurement
    if found is not None:
        table |= {"measured": found.loss, "kl": found.kl, "effective": found.effective}
        table["token_ratio"] = float(found.ratio == "token")
    if math.isfinite(state.true_reward) and math.isfinite(state.anchor_reward):
        table["forgetting"] = state.anchor_reward - state.true_reward
    elif found is not None and found.ratio != "nats" and state.span is not None:
        table["forgetting"] = found.loss * (state.span[1] - state.span[0])
    return table
