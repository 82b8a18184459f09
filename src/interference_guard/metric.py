"""The metric of a projection: how much a change of each unit is worth to the domain in training.

A projection may take any change that brings a displacement back inside a region. The Euclidean nearest point
takes it where the protected domain is most sensitive, whatever the domain in training wanted there. With a
metric that weighs each unit by the active domain's gradient energy, what is taken lies rather in units from
which that domain learns little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard
    from .local_model import LocalModel
    from .observation import Observation

# Least weight of a unit, in parts of their mean: a unit without gradients must not take everything.
FLOOR = 0.01


def active_energies(guard: Guard, observation: Observation | None) -> list[Tensor] | None:
    """The active domain's energy of every unit, ``(matrices, units)`` fp32 a block; None: project as Euclidean.

    Euclidean is also what a step of several domains gets, and one before any gradient was counted.

    Args:
        guard: The guard, at the end of a step.
        observation: The step's gradients of a model spread over ranks, before they are summed and counted. The
            energies are then this rank's parts, with the step's own, and must be summed before they are read.
    """
    if guard.config.metric != "gradient" or not guard.config.project or len(guard.active) != 1:
        return None
    curvature = guard.domains[next(iter(guard.active))].curvature
    kept = [sums.energy for sums in curvature.sums]
    if curvature.spread is None:
        return kept or None
    if observation is None:
        return None
    # What is not finite here ends in no curvature, and must not spoil the other ranks' parts.
    seen = [torch.where(observation.total.isfinite(), energy, 0.0) for energy in observation.energies]
    if kept:
        seen = [torch.add(new, old, alpha=curvature.decay) for new, old in zip(seen, kept, strict=True)]
    return [region.spread_units(energy) for region, energy in zip(curvature.spread.regions, seen, strict=True)]


def coordinate_metric(model: LocalModel, energies: Sequence[Tensor]) -> Tensor:
    """Weight of each coordinate of a local model.

    Args:
        model: The protected domain's.
        energies: What `active_energies` returned, summed over ranks.

    Returns:
        ``(n,)`` fp32, 1 for a unit of mean energy and at least `FLOOR`; all 1 where there is no energy.
    """
    # Per element of a unit, so that wide and narrow matrices compare.
    units = [block.protected(energy / block.width) for block, energy in zip(model.blocks, energies, strict=True)]
    # Over units, not coordinates: how many directions a block keeps depends on what it is stacked with.
    mean = torch.cat(units).mean()
    tiny = torch.finfo(mean.dtype).tiny
    parts = [
        seen.unsqueeze(-1).expand(-1, block.rank).flatten()
        for block, seen in zip(model.blocks, units, strict=True)
    ]
    # Energies can be as small as 1e-24: without any, or with a mean that underflowed, all count alike.
    return torch.where(mean > 0, torch.cat(parts) / mean.clamp(min=tiny), 1.0).clamp_(min=FLOOR)


def metrics_for(states: Sequence[DomainState], energies: Sequence[Tensor] | None) -> list[Tensor] | None:
    """`coordinate_metric` of every protected domain; None where the projection is Euclidean."""
    if energies is None:
        return None
    return [coordinate_metric(state.model, energies) for state in states if state.model is not None]
