"""Drives the recovery schedule with what the guard sees: starts phases, follows and ends them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .measuring import look, measure, share_span
from .probe import Measurement, Policy
from .recovery import RecoveryLimits, RecoverySchedule, expected_steps
from .renewing import move

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard

# Steps between two looks at the predictions: each reads the device.
LOOK_STEPS = 5


def follow(guard: Guard, found: Mapping[str, Measurement], policy: Policy | None = None, took: int = 1) -> None:
    """Take the schedule further, by as many optimizer steps as a host makes before it can train another domain.

    Args:
        guard: The guard, after these steps; its schedule is replaced and domains may be measured.
        found: Measurements made after them.
        policy: Replaces the guard's own for further measurements.
        took: How many steps.
    """
    limits = RecoveryLimits.of(guard.config, took)
    if guard.schedule.phase == "recovering":
        state = guard.domains[str(guard.schedule.domain)]
        # A host that could not switch at once has trained something else: that step is none of the phase's.
        if state.name in guard.trained:
            _go_on(guard, state, limits, policy, took)
        else:
            guard.schedule = guard.schedule.passed_over(guard.steps, limits)
            # Rows of it that such a step rehearsed are none of the phase's either.
            state.rollouts.take()
            _close(guard, state, policy)
        return
    guard.schedule = guard.schedule.step(False, guard.steps, limits, took)
    look_now = guard.steps // LOOK_STEPS > (guard.steps - took) // LOOK_STEPS
    excess = _excess(guard, found, limits, policy, look_now)
    guard.schedule = guard.schedule.start(excess, guard.steps, limits)
    if guard.schedule.phase == "recovering":
        _begin(guard, guard.domains[str(guard.schedule.domain)])


def abandon(guard: Guard) -> None:
    """Give up the present phase; its domain keeps its old anchor."""
    if guard.schedule.domain is not None:
        state = guard.domains[guard.schedule.domain]
        guard.schedule = guard.schedule.abandon(guard.steps, RecoveryLimits.of(guard.config))
        _close(guard, state, None)


def abandon_unserved(guard: Guard) -> None:
    """Give up a phase, as that of a former run, whose domain the host has no rows of; all ranks call it."""
    if guard.recoverable is not None and guard.recovery not in (None, *guard.recoverable):
        abandon(guard)


def limit_of(guard: Guard, found: Measurement) -> float:
    """The recovery budget in the unit of a measurement."""
    config = guard.config
    if found.ratio == "nats":
        return config.budget_nats * config.recovery_threshold / config.budget
    return config.recovery_threshold


def _excess(
    guard: Guard, found: Mapping[str, Measurement], limits: RecoveryLimits, policy: Policy | None, look_now: bool
) -> dict[str, float]:
    """Interference over the recovery budget of the domains that may recover.

    A prediction that passes it is checked by a measurement before anything is started.
    """
    # A reference domain has no rows that a trainer could make rollouts of.
    may = [
        name
        for name in guard.protected
        if not guard.domains[name].reference and (guard.recoverable is None or name in guard.recoverable)
    ]
    may = [name for name in may if guard.schedule.may(name, guard.steps, limits)]
    measured = {name: found[name] for name in may if name in found}
    if may and look_now:
        others = [name for name in may if name not in found and guard.domains[name].measurable]
        for name, raw in guard.raw_parts(others).items():
            region = guard.domains[name].region
            last = guard.domains[name].measurement
            if last is None:
                continue
            # Groups of ranks that share a model out add up in orders of their own, and all measure or none.
            _, predicted = guard.ranks.limits(0.0, region.predict(raw), guard.device)
            if predicted >= limit_of(guard, last):
                measured[name] = measure(guard, guard.domains[name], policy)
    return {name: item.loss / limit_of(guard, item) for name, item in measured.items()}


def _begin(guard: Guard, state: DomainState) -> None:
    # The curvature goes on while the old anchor must stay what it was.
    if state.model is not None:
        state.model.keep_energy()
    state.rollouts.take()
    displaced = guard.raw_parts([state.name])[state.name].quadratic
    loss = state.measurement.loss if state.measurement is not None else math.nan
    guard.schedule = replace(guard.schedule, displaced=displaced, loss=loss)


def _go_on(guard: Guard, state: DomainState, limits: RecoveryLimits, policy: Policy | None, took: int) -> None:
    schedule = guard.schedule
    if schedule.taken == 0:
        raw = guard.raw_parts([state.name])[state.name]
        if guard.config.project:
            # Only now: a phase that its host could not serve has cost nobody a step.
            state.tighten_region(raw.inside)
        within = guard.config.regained_within
        if state.measurement is not None:
            within *= limit_of(guard, state.measurement) / guard.config.recovery_threshold
        expected = took * expected_steps(schedule.displaced, raw.quadratic, schedule.loss, within)
        # From a moved region's centre nothing says how far the anchor is.
        schedule = replace(schedule, expected=math.nan if state.renewed_at else expected)
    last = schedule.taken + took >= limits.steps
    regained, judged = _regained(guard, state, schedule, last, policy)
    guard.schedule = replace(schedule, judged=schedule.judged + judged).step(regained, guard.steps, limits, took)
    _close(guard, state, policy)


def _close(guard: Guard, state: DomainState, policy: Policy | None) -> None:
    """What the end of a phase does to its domain; nothing while it runs."""
    if guard.schedule.phase == "recovering":
        return
    if guard.schedule.regained:
        # The next foreign step sets the new anchor, with fresh directions.
        state.since_refresh = guard.config.refresh_steps
        return
    if state.renewed_at and state.own_steps:
        # Its region stands where the domain had lost, and would take back what its own steps have brought.
        move(guard, state, look(guard, state, policy).loss)
    state.own_steps = 0
    # That of its last step as a protected one; its own steps have moved the weights since.
    state.subspace = None
    state.forget_pending()


def _regained(
    guard: Guard, state: DomainState, schedule: RecoverySchedule, last: bool, policy: Policy | None
) -> tuple[bool, bool]:
    """Whether the domain's reward is back, and whether rollouts of this step said so.

    By the rollouts of this phase or, without rewards, by a probe. Rollouts of its first step, and those that
    serve several steps (mini-batches, epochs), are of the weights before the phase: where there are no others, a
    probe decides at its last step.
    """
    # Ranks must take the same branch below, and each has seen rewards of its own.
    share_span(guard, state)
    total, count = guard.ranks.totals(list(state.rollouts.sums()), guard.device)
    span, within = state.span, guard.config.regained_within
    judged = False
    if count and span is not None and math.isfinite(state.target_reward):
        state.rollouts.take()
        if schedule.taken == 0:
            # These were sampled under the weights that were measured when the phase began.
            state.region.truth((state.retained_reward - total / count) / (span[1] - span[0]))
        regained = (state.target_reward - total / count) / (span[1] - span[0]) <= within
        if regained or schedule.taken or not last:
            return regained, True
        judged = True
    if not state.measurable or (span is not None and not (last and schedule.judged < 2)):
        # Rewards exist and this step brought none: it reused rollouts that were judged before.
        return False, judged
    # Looked at, not measured: its own steps must not move its radius.
    found = look(guard, state, policy)
    return found.loss <= within * limit_of(guard, found) / guard.config.recovery_threshold, judged
