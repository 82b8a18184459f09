"""Sets a domain's anchor: its local model at the present weights, and the scores its probe starts from."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

from .local_model import anchor_domain
from .measuring import score
from .protection import protected_rows

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard


def set_anchor(guard: Guard, state: DomainState) -> None:
    """Anchor a domain at the present weights and score its retained completions there; all ranks call it."""
    if not state.curvature.sums or not state.curvature.count.item():
        # Only zero or non-finite gradients so far: there is nothing to protect.
        state.own_steps = 0
        return
    state.retained = state.latest(guard.config.retain)
    state.pending = [] if state.retained is None else [state.retained]
    energies = state.curvature.energies()
    chosen = protected_rows(state, guard, energies)
    guard.forget_sets(state.name)
    reuse = state.model if state.since_refresh < guard.config.refresh_steps else None
    state.model = anchor_domain(
        state.curvature, guard.view.weights(), guard.view.residuals, guard.config.rank, chosen, reuse, energies
    )
    if reuse is None:
        state.since_refresh = 0
    state.slopes = None if state.gradient is None else state.gradient.along(state.model)
    _score(guard, state)
    state.anchored = True
    state.own_steps = state.foreign_steps = 0
    state.true_reward = math.nan
    state.subspace = None
    state.measurement = None
    state.start = None


def _score(guard: Guard, state: DomainState) -> None:
    """Log-probabilities and mean reward of the retained completions, and the reward range over ranks."""
    rows = 0.0 if state.retained is None else float(len(state.retained))
    rewarded = state.retained is not None and state.retained.rewards is not None
    every, with_rewards = guard.ranks.totals([rows, rows if rewarded else 0.0], guard.device)
    state.measurable = every > 0
    if not state.measurable:
        warnings.warn(
            f"No completions of domain {state.name!r} were retained, so its interference cannot be "
            "measured: its radius stays what the first foreign step sets. Call guard.retain().",
            stacklevel=6,
        )
        return
    known = not math.isnan(state.low)
    low, high = guard.ranks.limits(
        state.low if known else math.inf, state.high if known else -math.inf, guard.device
    )
    if math.isfinite(high):
        state.see_rewards(low, high)
    scores = score(guard, state.retained, guard.policy)
    state.anchor_scores = None if scores is None else scores.detach()
    if with_rewards and not state.evaluated:
        own = state.retained.rewards if state.retained is not None else None
        (total,) = guard.ranks.totals([0.0 if own is None else own.double().sum().item()], guard.device)
        state.anchor_reward = total / with_rewards
