"""Sets a domain's anchor: its local model at the present weights, and the scores its probe starts from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .exact import doubled, exact_products
from .first_order import slopes_of
from .local_model import anchor_domain
from .measuring import score, share_span
from .protection import protected_rows
from .telling import warn

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard


def set_anchor(guard: Guard, state: DomainState) -> None:
    """Anchor a domain at the present weights and score its retained completions there; all ranks call it."""
    if not state.curvature.sums or not state.curvature.count.item():
        # Only zero or non-finite gradients so far: there is nothing to protect.
        state.own_steps, state.start = 0, None
        return
    # The rows are scored outside of it, by the host's own settings, as probes will be.
    with exact_products(guard.device):
        energies = state.curvature.energies()
        chosen = protected_rows(state, guard, energies)
        guard.forget_sets(state.name)
        reuse = state.model if state.since_refresh < guard.config.refresh_steps else None
        state.model = anchor_domain(
            state.curvature,
            energies,
            guard.view.weights(),
            guard.view.residuals,
            guard.view.ranks,
            chosen,
            reuse,
        )
        if reuse is None:
            state.since_refresh = 0
        state.slopes = slopes_of(guard, state, state.model)
    state.fresh = _scores_are_due(guard, state)
    # A recovery of another domain came between: after it the training goes on, and its end is the true anchor.
    state.interrupted = guard.recovery is not None and not state.anchored
    if state.fresh:
        # Rows of a reference domain are the same in every process.
        latest = state.latest(guard.config.retain if state.reference else guard.retain_here)
        before, state.retained = state.retained, None if latest is None else latest.to(guard.device)
        try:
            _score(guard, state, recovered=state.anchored)
        except BaseException:
            # A host may catch what its policy raises and go on. The anchor is set again then, of the same rows.
            state.retained = before
            raise
        state.scored_at = guard.steps
        state.forget_pending()
    state.anchored = True
    state.own_steps = state.foreign_steps = state.renewed_at = 0
    state.region.anchor(turned=reuse is None)
    state.kept_at = -1
    state.true_reward = math.nan
    state.subspace = None
    state.measurement = None
    if not state.interrupted:
        state.start = None


def _scores_are_due(guard: Guard, state: DomainState) -> bool:
    """Whether this anchor gets a probe of its own; without one the domain keeps that of its last scored anchor.

    A domain that is left and taken up again every few steps (interleaved training) would otherwise cost a
    forward pass at each of its anchors.
    """
    if (
        state.scored_at is None
        or state.interrupted
        or state.own_steps >= guard.config.refresh_steps
        or state.anchored
    ):
        return True
    return guard.steps - state.scored_at >= guard.config.probe_steps


def _score(guard: Guard, state: DomainState, recovered: bool) -> None:
    """Log-probabilities and mean reward of the retained completions, and the reward range over ranks."""
    rows = scored = 0.0
    if state.retained is not None:
        rows, scored = float(len(state.retained)), float(state.retained.scorable_rows)
    rewarded = state.retained is not None and state.retained.rewards is not None
    every, with_rewards = guard.ranks.totals([scored, rows if rewarded else 0.0], guard.device)
    state.measurable = every > 0
    if not state.measurable:
        warn(
            f"No completions of domain {state.name!r} with a token to score were retained, so its interference "
            "cannot be measured: its radius stays what the first foreign step sets. Give Guard.retain() such "
            "rows; in TRL and veRL see that the domain's rows have rewards, or labels in SFT, and are not all "
            "cut off or masked."
        )
        return
    if with_rewards and not rewarded:
        # Rows of a supervised warm start, on a rank that saw no others: ranks must measure the same.
        state.retained = None
    share_span(guard, state)
    temperature = -math.inf if state.retained is None else state.retained.temperature
    state.temperature = guard.ranks.limits(0.0, temperature, guard.device)[1]
    scores = score(guard, state, guard.policy)
    state.anchor_scores = None if scores is None else scores.detach()
    if not with_rewards:
        state.target_reward = math.nan
        return
    own = state.retained.rewards if state.retained is not None else None
    totals = [sum(total for total, _ in state.recent), sum(count for _, count in state.recent)]
    total, recent, count, unscorable = guard.ranks.totals(
        [0.0 if own is None else doubled(own).sum().item(), *totals, float(state.unscorable())], guard.device
    )
    # The rows that were left out were rewarded too, and differently: those that are kept are not all there were.
    state.retained_reward = recent / count if unscorable and count else total / with_rewards
    if recovered:
        # An evaluation of the anchor before says nothing of this one. What a recovery must reach stays what the
        # domain's own training reached, so that it neither sinks nor rises from phase to phase.
        state.evaluated = False
    elif count:
        state.target_reward = recent / count
    if not state.evaluated:
        state.anchor_reward = state.retained_reward
