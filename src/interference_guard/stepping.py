"""What one optimizer step does to the guard: gradients in before it, displacements held after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .anchoring import set_anchor
from .first_order import GradientMean
from .local_model import displacements, project
from .protection import span_of_edits

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard


def take_gradients(guard: Guard) -> None:
    """Anchor the domains that stop being trained, then add the step's gradients to the active ones' sums."""
    active = guard.active
    guard.trained = active
    started = perf_counter()
    # By name: ranks may have met the domains in another order, and anchoring reduces over ranks.
    for name in sorted(guard.domains):
        if name not in active and guard.domains[name].own_steps and name != guard.recovery:
            set_anchor(guard, guard.domains[name])
    started = guard.clock.add("anchor", started)
    batch = guard.view.gradients()
    if len(active) > 1:
        guard.warn_mixed(active)
    for name in active:
        state = guard.domains[name]
        if state.start is None and guard.config.selection == "edits" and not state.anchored:
            state.start = span_of_edits(guard.view.weights(), guard.view.residuals)
        if len(active) == 1:
            _observe(guard, state, batch)
        state.own_steps += 1
        state.since_refresh += 1
        state.reference = False
        if name == guard.recovery:
            # Its anchor stays until the phase has shown whether the domain comes back to it.
            continue
        state.evaluated = False
        state.anchored = False
    guard.clock.add("observe", started)


def _observe(guard: Guard, state: DomainState, batch: Sequence[Tensor]) -> None:
    state.curvature.observe(batch)
    if guard.config.first_order:
        if state.gradient is None:
            state.gradient = GradientMean(guard.view.omegas)
        state.gradient.observe(batch)


def hold(guard: Guard, states: Sequence[DomainState]) -> None:
    """See the displacement of every protected domain and project the weights where it is too far, in place."""
    started = perf_counter()
    models = [state.model for state in states if state.model is not None]
    seen = displacements(guard.view.weights(), models)
    for state, displacement in zip(states, seen, strict=True):
        state.foreign_steps += 1
        state.subspace = displacement.energy()
        # The first visible displacement: nothing else is known of the unit yet. A step at rate 0 (the
        # start of a warm-up) shows rounding alone, and a radius of that size would freeze learning.
        if state.radius is None:
            state.radius = torch.full_like(state.subspace, math.inf)
        if not state.region.radius and state.model is not None:
            visible = (state.subspace > 4 * state.model.rounding()) & state.radius.isinf()
            state.radius = torch.where(visible, state.subspace, state.radius)
    started = guard.clock.add("predict", started)
    if not guard.config.project:
        return
    radii = [state.radius for state in states if state.radius is not None]
    before = _subspaces(states)
    changes = project(models, seen, radii, guard.config.sweeps, guard.reads_back, guard.grams)
    if changes is not None:
        guard.view.subtract(changes)
        for state, displacement in zip(states, seen, strict=True):
            state.subspace = displacement.energy()
    guard.kept.add((_subspaces(states).sum() / before.sum().clamp(min=1e-37)).clamp(max=1.0).sqrt())
    guard.clock.add("project", started)


def _subspaces(states: Sequence[DomainState]) -> Tensor:
    return torch.stack([state.subspace for state in states if state.subspace is not None])
