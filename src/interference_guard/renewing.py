"""Gives a protected domain new directions, and puts the centre of its region where the weights are.

A domain's directions come from its own training. Later domains move what they leave free, and in time the domain
loses by that: the part of its prediction outside of the directions leads. No radius holds it then. A smaller one
freezes what does no harm, and where several regions have no point in common each pulls at weights that it cannot
have. So the curvature is taken anew where the weights are, from the retained completions, and the region begins
there at the length of one step. The loss so far stays on the domain's account.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from .curvature import DomainCurvature
from .exact import exact_products
from .local_model import anchor_domain
from .reference import add_softened, merge_ranks

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard

# Rows of a backward pass; one at a time where so many do not fit.
BATCHES = (8, 1)


def due(guard: Guard, state: DomainState) -> bool:
    """Whether the domain's latest measurement asks for it; the same on all ranks."""
    config = guard.config
    if not (config.renew and config.project and state.fresh) or state.name == guard.recovery:
        return False
    return state.region.renewable and state.foreign_steps - state.placed_at >= config.probe_steps


def renew(guard: Guard, state: DomainState) -> None:
    """Move a domain's region to the present weights, with new directions where they can be had.

    All ranks call it. Parameters' gradients, the optimizer and the global random generators are not touched.

    Args:
        guard: The guard.
        state: One of its protected domains, which was just measured; changed in place.
    """
    assert state.model is not None
    curvature = _curvature(guard, state)
    weights, matrices = guard.view.weights(), guard.view.residuals
    with exact_products(guard.device):
        if curvature is None:
            state.model.stand(weights, matrices)
        else:
            rows = [block.rows for block in state.model.blocks]
            state.curvature = curvature
            state.model = anchor_domain(curvature, weights, matrices, guard.view.ranks, rows)
            guard.grams.clear()
            state.slopes = None if state.gradient is None else state.gradient.along(state.model)
    state.region.move(turned=curvature is not None)
    state.radius = state.subspace = None
    state.placed_at = state.foreign_steps
    state.renewals += 1


def _curvature(guard: Guard, state: DomainState) -> DomainCurvature | None:
    """Softened curvature of the retained rows at the present weights; None where some rank cannot have it."""
    if not guard.softens or guard.view.shards.managed:
        return None
    curvature = guard.new_state(state.name).curvature
    failure = _add(guard, state, curvature)
    found = bool(curvature.sums) and bool(curvature.count.item())
    # Ranks must go the same way.
    least, failed = guard.ranks.limits(float(found), float(failure is not None), guard.device)
    guard.softens = not failed
    if failure is not None:
        warnings.warn(
            f"No new directions can be computed for domain {state.name!r}: {failure} Its region moves with its "
            "old directions. Set renew=False in GuardConfig to leave regions where they are.",
            stacklevel=5,
        )
    if not least:
        return None
    merge_ranks(guard, curvature)
    curvature.match(state.curvature)
    return curvature


def _add(guard: Guard, state: DomainState, curvature: DomainCurvature) -> str | None:
    """Backward passes over this rank's rows, or why there are none."""
    if state.retained is None:
        return None
    rows = state.retained.to(guard.device)
    failure = None
    for size in BATCHES:
        try:
            add_softened(guard, curvature, rows, -(-len(rows) // size), size)
            return None
        except torch.OutOfMemoryError:
            failure = "a backward pass over one of its retained completions does not fit into the memory."
            curvature.sums.clear()
            curvature.count.zero_()
        # The forward pass is the host's, and may ask for more than rows of tokens: its run must go on.
        except Exception as error:
            return f"a backward pass over its retained completions ended with {type(error).__name__}: {error}"
    return failure
