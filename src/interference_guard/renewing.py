"""Gives a protected domain new directions, and puts the centre of its region where the weights are.

A domain's directions come from its own training. Later domains move what they leave free, and in time the domain
loses by that: the part of its prediction outside of the directions leads. No radius holds it then. A smaller one
freezes what does no harm, and where several regions have no point in common each pulls at weights that it cannot
have. So the curvature is taken anew where the weights are, from the retained completions, and the region begins
there at the length of one step. The loss so far stays on the domain's account.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import torch

from .curvature import DomainCurvature
from .exact import exact_products
from .first_order import slopes_of
from .local_model import LocalModel, anchor_domain
from .protection import protected_rows
from .reference import add_what_fits, merge_ranks
from .telling import warn

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard

# Rows of a backward pass; one at a time where so many do not fit.
BATCHES = (8, 1)


def renew_if_due(guard: Guard, state: DomainState) -> None:
    """Renew a domain that was just measured, if the measurement asks for it; all ranks call it."""
    if due(guard, state):
        started = perf_counter()
        renew(guard, state)
        guard.clock.add("anchor", started)


def due(guard: Guard, state: DomainState) -> bool:
    """Whether the domain's latest measurement asks for it; the same on all ranks."""
    config = guard.config
    if not (config.renew and config.project and state.fresh) or state.name == guard.recovery:
        return False
    return state.region.renewable and state.foreign_steps - state.renewed_at >= config.probe_steps


def renew(guard: Guard, state: DomainState) -> None:
    """Move a domain's region to the present weights, with new directions where they can be had.

    All ranks call it. Parameters' gradients, the optimizer and the global random generators are not touched.

    Args:
        guard: The guard.
        state: One of its protected domains, which was just measured; changed in place.
    """
    state.renewals += 1
    curvature = _curvature(guard, state)
    model = None if curvature is None else _model(guard, state, curvature)
    if curvature is None or model is None:
        move(guard, state)
        return
    state.model = model
    guard.forget_sets(state.name)
    with exact_products(guard.device):
        state.slopes = slopes_of(guard, state, model)
    state.curvature, state.since_refresh = curvature, 0
    state.move_region(turned=True)


@torch.no_grad()
def move(guard: Guard, state: DomainState, loss: float | None = None) -> None:
    """Move a domain's region to the present weights, with the directions it has; all ranks call it.

    Args:
        guard: The guard.
        state: The domain, changed in place.
        loss: Measured at these weights; by default the latest measurement is of them.
    """
    assert state.model is not None
    with exact_products(guard.device):
        state.model.stand(guard.view.weights(), guard.view.residuals)
    state.move_region(turned=False, loss=loss)


@torch.no_grad()
def _model(guard: Guard, state: DomainState, curvature: DomainCurvature) -> LocalModel | None:
    """A local model at the present weights; None where some rank has no room to factor the curvature."""
    assert state.model is not None
    sets, model = (state.protected_set, state.half_set), None
    try:
        with exact_products(guard.device):
            energies = curvature.energies()
            rows = [block.rows for block in state.model.blocks]
            if guard.config.selection == "energy":
                rows = protected_rows(state, guard, energies)
            weights, matrices = guard.view.weights(), guard.view.residuals
            model = anchor_domain(curvature, energies, weights, matrices, guard.view.ranks, rows)
    except torch.OutOfMemoryError:
        failure = "a factorisation of its curvature does not fit into the memory."
    else:
        failure = "another rank has no room for them."
    if guard.ranks.any(model is None, guard.device):
        state.protected_set, state.half_set = sets
        _give_up(guard, state, failure)
        return None
    return model


def _give_up(guard: Guard, state: DomainState, failure: str) -> None:
    """Ask for no new directions any more, of any domain."""
    guard.differentiates = False
    warn(
        f"No new directions can be computed for domain {state.name!r}: {failure} Its region moves with its old "
        "directions. Set renew=False in GuardConfig to leave regions where they are."
    )


def _curvature(guard: Guard, state: DomainState) -> DomainCurvature | None:
    """Softened curvature of all ranks' retained rows at the present weights; None where it cannot be had."""
    if not guard.differentiates or guard.view.shards.managed or guard.view.gathered:
        # Engines keep the gradients, and ranks make as many passes as they have rows.
        return None
    curvature = guard.new_state(state.name).curvature
    rows = None if state.retained is None else state.retained.to(guard.device)
    failure = add_what_fits(guard, curvature, rows, 0 if rows is None else len(rows), BATCHES)
    if failure is not None:
        _give_up(guard, state, failure)
        return None
    if not curvature.sums:
        # This rank has no rows.
        curvature.begin_like(state.curvature)
    merge_ranks(guard, curvature)
    if not curvature.count.item():
        return None
    curvature.match(state.curvature)
    return curvature
