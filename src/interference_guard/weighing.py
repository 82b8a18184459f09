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
        observation: The step's gradients of a model spread over ranks, not yet summed. The energies are then this
            rank's parts, which must be summed before they are read.
    """
    config = guard.config
    if config.projection_metric != "gradient" or not config.project or len(guard.active) != 1:
        return None
    return guard.domains[next(iter(guard.active))].curvature.energies_with(observation) or None


def coordinate_metric(model: LocalModel, energies: Sequence[Tensor]) -> Tensor:
    """Weight of each coordinate of a local model.

    Args:
        model: The protected domain's.
        energies: What `active_energies` returned, summed over ranks.

    Returns:
        ``(n,)`` fp32 in the order of `Displacement.flat`, 1 for a unit of mean energy and at least `FLOOR`; all 1
        where there is no energy.
    """
    # Per element of a unit, so that wide and narrow matrices compare.
    units = [block.protected(energy / block.width) for block, energy in zip(model.blocks, energies, strict=True)]
    # Over units, not coordinates: how many directions a block keeps depends on what it is stacked with.
    mean = torch.cat(units).mean()
    tiny = torch.finfo(mean.dtype).tiny
    parts = [units[index].unsqueeze(-1).expand(-1, model.blocks[index].rank).flatten() for index in model.order]
    # Energies can be as small as 1e-24: without any, or with a mean that underflowed, all count alike.
    return torch.where(mean > 0, torch.cat(parts) / mean.clamp(min=tiny), 1.0).clamp_(min=FLOOR)
