"""What one optimizer step does to the guard: gradients in before it, displacements held after it."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .anchoring import set_anchor
from .correcting import project
from .errors import MissingDomainError
from .exact import exact_products
from .first_order import GradientMean
from .local_model import displacements, see_through
from .observation import Observation
from .weighing import active_energies, coordinate_metric

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard

# An anchored domain keeps its anchor through this many consecutive mixed steps: one or two mixed batches at a
# phase boundary can make several steps each.
MIXED = 16


def follow(guard: Guard) -> None:
    """Follow the model to another device, for instance back from the CPU of an engine that offloads it."""
    guard.view.place()
    if any(state.device not in (None, guard.device) for state in guard.domains.values()):
        guard.load_state_dict(guard.state_dict())


def open_step(guard: Guard) -> None:
    """Anchor the domains that stop being trained, at weights that are still unchanged."""
    guard.check_announced()
    follow(guard)
    active, spread = guard.active, guard.view.spread
    # By name: ranks may have met the domains in another order, and anchoring reduces over ranks.
    ended = [
        name
        for name in sorted(guard.domains)
        if name not in active and guard.domains[name].own_steps and name != guard.recovery
    ]
    if ended:
        guard.view.check_in_place()
    guard.trained = active
    started = perf_counter()
    for name in guard.protected:
        # Rehearsed: sampled while it is held, and by its next anchor of a policy of long ago. After the own steps
        # of a recovery they are its own.
        if not guard.domains[name].own_steps:
            guard.domains[name].discard(guard.steps)
        if guard.recovery is None:
            # One that a recovery had interrupted, if it was not taken up again.
            guard.domains[name].start = None
    for name in ended:
        own_steps = guard.domains[name].own_steps
        set_anchor(guard, guard.domains[name])
        if not guard.domains[name].anchored:
            guard.warn_without_gradients(name, own_steps)
    for name in active if guard.config.selection == "edits" else ():
        state = guard.domains[name]
        if state.start is None and name != guard.recovery and not keeps_anchor(guard, state):
            with exact_products(guard.device):
                state.start = see_through(guard.view.weights(), guard.view.edits, spread)
    guard.clock.add("anchor", started)


def keeps_anchor(guard: Guard, state: DomainState) -> bool:
    """Whether an active domain stays anchored because the present step, of several, is not its own training."""
    return len(guard.active) > 1 and state.anchored and state.mixed_steps < MIXED and not state.own_steps


def take_gradients(guard: Guard) -> None:
    """Add the step's gradients to the active domains' sums.

    Of a model spread over ranks the gradients are only looked at: `take_in` adds them after the step, when
    one sum over ranks serves the observation and the prediction.
    """
    active, spread = guard.active, guard.view.spread
    if active != guard.trained:
        raise MissingDomainError(
            f"The step began as one of {list(guard.trained)}, and its gradients are of {list(active)}. Call "
            "guard.begin(), or enter guard.domain(), before optimizer.step(closure) and not inside of the "
            "closure: anchors are set before it is evaluated."
        )
    started = perf_counter()
    batch = guard.view.gradients(guard.grad_scale)
    if spread is not None:
        guard.observation = Observation(batch, guard.view.omegas, spread)
    if len(active) > 1:
        guard.warn_mixed(active)
    for name in active:
        state = guard.domains[name]
        if keeps_anchor(guard, state):
            # The seam of two batches and no training of its own: what it has lost must not become its anchor, nor
            # its rows of now, which another policy made, be those of its next one.
            state.mixed_steps += 1
            state.discard(guard.steps)
            continue
        state.mixed_steps = 0
        if guard.config.first_order and state.gradient is None and len(active) == 1:
            state.gradient = GradientMean(guard.view.omegas, spread=spread)
        if spread is None and len(active) == 1:
            state.energy = state.curvature.observe(batch)
            if state.gradient is not None and guard.config.first_order:
                state.gradient.observe(batch)
        state.own_steps += 1
        state.since_refresh += 1
        state.reference = False
        if name == guard.recovery:
            # Its anchor stays until the phase has shown whether the domain comes back to it.
            continue
        state.evaluated = False
        state.anchored = False
        state.region.loosen()
        guard.schedule = guard.schedule.trained(name)
    guard.clock.add("observe", started)


def take_in(guard: Guard, seen: Observation) -> None:
    """Add an observation, summed over ranks, to the active domain's sums; a mixed step's belongs to none."""
    started = perf_counter()
    active = guard.active
    for name in active if len(active) == 1 else ():
        state = guard.domains[name]
        state.curvature.add(seen)
        state.energy = seen.total
        if state.gradient is not None and guard.config.first_order:
            state.gradient.add(seen)
    guard.clock.add("observe", started)


def hold(guard: Guard, states: Sequence[DomainState]) -> None:
    """See the displacement of every protected domain and project the weights where it is too far, in place."""
    started = perf_counter()
    models = [state.model for state in states if state.model is not None]
    seen = displacements(guard.view.weights(), models) if models else []
    spread, (observation, guard.observation) = guard.view.spread, (guard.observation, None)
    energies = active_energies(guard, observation) if models else None
    if spread is not None:
        # The one collective of a step.
        shared = [] if observation is None else observation.shared
        spread.add([item.flat for item in seen] + shared + (energies or []))
        if observation is not None:
            take_in(guard, observation)
    if not models:
        return
    for state, displacement in zip(states, seen, strict=True):
        state.foreign_steps += 1
        state.mixed_steps = 0
        state.subspace = displacement.energy()
        state.update_radius(guard.rate)
    started = guard.clock.add("predict", started)
    if not guard.config.project:
        return
    radii = [state.radius for state in states if state.radius is not None]
    before = _subspaces(states)
    metrics = None if energies is None else [coordinate_metric(model, energies) for model in models]
    changes = project(models, seen, before, radii, guard.config.sweeps, guard.grams, metrics)
    if changes is not None:
        guard.view.subtract(changes, guard.steps)
        for state, displacement in zip(states, seen, strict=True):
            state.subspace = displacement.energy()
            if displacement.taken is not None and state.model is not None:
                # A host may restore weights that were no numbers for a step; in the sum it would stay.
                moved = state.model.lengths(displacement.taken).nan_to_num(0.0, 0.0, 0.0)
                state.moved = moved if state.moved is None else state.moved + moved
    total = before.sum()
    kept = (_subspaces(states).sum() / total.clamp(min=1e-37)).clamp(max=1.0).sqrt()
    guard.kept.add(torch.where(total > 0, kept, 1.0))
    guard.clock.add("project", started)


def _subspaces(states: Sequence[DomainState]) -> Tensor:
    return torch.stack([state.subspace for state in states if state.subspace is not None])
