"""Measures one domain's interference on its retained completions and lets the truth correct the scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ConfigError, ShapeError
from .exact import exact_products
from .first_order import first_order
from .generators import generators_kept
from .local_model import predict
from .probe import Completions, Measurement, Policy, estimate
from .trust_region import Raw

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard

# The first foreign steps are the ones about which least is known.
EARLY_PROBES = (1, 2, 4)


def due(guard: Guard, state: DomainState) -> bool:
    """Whether it is a protected domain's turn to be measured, after the step that was just made."""
    early = state.foreign_steps - state.renewed_at in EARLY_PROBES and state.fresh
    turn = early or state.foreign_steps % guard.config.probe_steps == 0
    return turn and state.foreign_steps > 0 and state.measurable


def score(guard: Guard, state: DomainState, policy: Policy) -> Tensor | None:
    """Log-probabilities of this rank's retained rows, None without rows; of a sharded model all ranks call it.

    Rows that are alike are scored once.
    """
    if state.retained is None:
        return _score(guard, None, policy, state.temperature)
    chosen, places = state.retained.distinct
    different = replace(state.retained.rows(chosen), rewards=None)
    scores = _score(guard, different, policy, state.temperature)
    return None if scores is None else scores[places.to(scores.device)]


def _score(guard: Guard, rows: Completions | None, policy: Policy, temperature: float) -> Tensor | None:
    """Where all ranks pass forward at once (a sharded model), each scores as many: short of rows, some again.

    Their rows are then of one width too: how many of them a policy takes at a time may depend on it.
    """
    if not (guard.view.gathered or guard.scores_together):
        return None if rows is None else _scored(guard, rows, policy)
    count, length = (0, 0) if rows is None else rows.input_ids.shape
    least, most = guard.ranks.limits(-float(length), float(count), guard.device)
    widest, most = -int(least), int(most)
    if not most:
        return None
    if rows is None:
        ids = torch.zeros(1, widest, dtype=torch.int64, device=guard.device)
        rows = Completions(ids, torch.ones_like(ids), torch.ones_like(ids))
    repeated = torch.arange(most, device=rows.input_ids.device) % len(rows)
    # A policy may take rows of another temperature in another way, so ranks must agree on that too.
    rows = replace(rows.rows(repeated).widened(widest), temperature=temperature)
    scores = _scored(guard, rows, getattr(policy, "together", policy))
    return scores[:count, :length] if count else None


def _scored(guard: Guard, rows: Completions, policy: Policy) -> Tensor:
    # A model may draw in evaluation mode too, and a host's policy may do anything.
    try:
        with generators_kept(guard.device):
            scores = policy(rows)
    finally:
        guard.view.reshard()
    wanted = tuple(rows.input_ids.shape)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != wanted:
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ShapeError(
            f"The policy returned {found} for rows of shape {wanted}. It must return the log-probability of each "
            "token given those before it, one tensor of the rows' shape: see interference_guard.probe.Policy."
        )
    return scores


def share_span(guard: Guard, state: DomainState) -> None:
    """Widen a domain's reward range to what any rank has seen; all ranks call it."""
    known = not math.isnan(state.low)
    low, high = guard.ranks.limits(
        state.low if known else math.inf, state.high if known else -math.inf, guard.device
    )
    if math.isfinite(high):
        state.see_rewards(low, high)


def look(guard: Guard, state: DomainState, policy: Policy | None = None) -> Measurement:
    """Estimate a domain's loss and KL under the present weights; nothing of the guard changes."""
    share_span(guard, state)
    # Another rank may hold all rows of a domain: this one then adds nothing to the sums.
    now = anchor = mask = torch.zeros(0, 1, device=guard.device)
    rewards: Tensor | None = torch.zeros(0, device=guard.device)
    scores = score(guard, state, policy or guard.policy)
    if state.retained is not None and state.anchor_scores is not None and scores is not None:
        now, anchor = scores, state.anchor_scores
        mask, rewards = state.retained.completion_mask, state.retained.rewards
    return estimate(state.name, now, anchor, mask, rewards, state.span, guard.ranks.sum)


def predictions(guard: Guard, states: Sequence[DomainState]) -> dict[str, Raw]:
    """Uncalibrated prediction of anchored domains under the present weights, by name; see `Guard.raw_parts`."""
    models = {state.name: (state, state.model) for state in states if state.model is not None}
    rows = []
    with exact_products(guard.device):
        wanted = [model for _, model in models.values()]
        parts = predict(guard.view.weights(), wanted, guard.view.residuals) if models else []
        for (state, _), (seen, inside, outside) in zip(models.values(), parts, strict=True):
            linear = inside.new_zeros(()) if state.slopes is None else first_order(state.slopes, seen.views)
            rows.append(torch.stack([inside, outside, linear]))
    table = torch.stack(rows).tolist() if rows else []
    return {name: Raw(*numbers) for name, numbers in zip(models, table, strict=True)}


def measure(guard: Guard, state: DomainState, policy: Policy | None = None) -> Measurement:
    """Measure a domain now, calibrate its prediction and adapt its radius; see `Guard.measure`."""
    started = perf_counter()
    found = look(guard, state, policy)
    raw = guard.raw_parts([state.name])[state.name]
    state.settle_radius()
    if state.fresh:
        # At the centre of a region there is nothing but rounding, which no loss may be divided by.
        noise = 0.0 if state.model is None else state.model.rounding().item()
        result = state.region.measured(found, raw, adapt=guard.config.project, noise=noise)
    else:
        # The domain's own steps since that probe are in the loss: nothing may be learned from it.
        result = found.scaled(state.region.correction(found.ratio), raw.quadratic, state.region.predict(raw))
    state.follow_region()
    state.measurement = result
    guard.clock.add("probe", started)
    return result


def calibrate(guard: Guard, state: DomainState, reward: float) -> None:
    """Take in the true mean reward of a domain under the present weights; see `Guard.calibrate`."""
    try:
        finite = math.isfinite(reward)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"guard.calibrate({state.name!r}, ...) was given {reward!r}. Give it the mean reward, a number."
        ) from error
    # NumPy's numbers and tensors are no plain ones, which a state is made of. Ranks that evaluated rows of their
    # own must not decide by their own means.
    total, count = guard.ranks.totals([float(reward) if finite else 0.0, float(finite)], guard.device)
    if not count:
        # An evaluation in which nothing was scored; in the running sums it would stay for good.
        return
    reward = total / count
    if not state.anchored or not state.foreign_steps:
        state.anchor_reward, state.evaluated = reward, True
        return
    state.true_reward = reward
    if state.name == guard.recovery:
        # Its own steps move it on purpose: they say nothing about what others cost it.
        return
    share_span(guard, state)
    span = state.span
    if span is None or not state.measurable:
        return
    loss = measure(guard, state).loss
    if not state.fresh:
        return
    if state.evaluated:
        state.region.truth((state.anchor_reward - reward) / (span[1] - span[0]))
    else:
        # The retained rows' rewards are of other prompts than the evaluation's.
        state.anchor_reward, state.evaluated = reward + loss * (span[1] - span[0]), True
