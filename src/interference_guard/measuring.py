"""Measures one domain's interference on its retained completions and lets the truth correct the scale."""

from __future__ import annotations

import math
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .probe import Measurement, Policy, estimate

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard


def look(guard: Guard, state: DomainState, policy: Policy | None = None) -> Measurement:
    """Estimate a domain's loss and KL under the present weights; nothing of the guard changes."""
    # Another rank may hold all rows of a domain: this one then adds nothing to the sums.
    now = anchor = mask = torch.zeros(0, 1, device=guard.device)
    rewards: Tensor | None = torch.zeros(0, device=guard.device)
    if state.retained is not None and state.anchor_scores is not None:
        now, anchor = (policy or guard.policy)(state.retained), state.anchor_scores
        mask, rewards = state.retained.completion_mask, state.retained.rewards
        guard.view.reshard()
    return estimate(state.name, now, anchor, mask, rewards, state.span, guard.ranks.sum)


def measure(guard: Guard, state: DomainState, policy: Policy | None = None) -> Measurement:
    """Measure a domain now, calibrate its prediction and adapt its radius; see `Guard.measure`."""
    started = perf_counter()
    found = look(guard, state, policy)
    raw = guard.interference([state.name])[state.name]
    if state.radius is not None and not state.region.radius and math.isfinite(first := state.radius.item()):
        state.region.radius = state.region.largest = first
    result = state.region.measured(found, raw, adapt=guard.config.project)
    if state.radius is not None and state.region.radius:
        state.radius.fill_(state.region.radius)
    state.measurement = result
    guard.clock.add("probe", started)
    return result


def calibrate(guard: Guard, state: DomainState, reward: float) -> None:
    """Take in the true mean reward of a domain under the present weights; see `Guard.calibrate`."""
    if not state.anchored or not state.foreign_steps:
        state.anchor_reward, state.evaluated = reward, True
        return
    state.true_reward = reward
    span = state.span
    if span is None or not state.measurable:
        return
    loss = measure(guard, state).loss
    if state.evaluated:
        state.region.truth((state.anchor_reward - reward) / (span[1] - span[0]))
    else:
        # The retained rows' rewards are of other prompts than the evaluation's.
        state.anchor_reward, state.evaluated = reward + loss * (span[1] - span[0]), True
