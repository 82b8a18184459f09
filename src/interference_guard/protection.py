"""Scores behind a domain's protected set, and the rows a local model anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks import Block
from .protected import ProtectedSet, random_units, select_units

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard


def by_parameter(blocks: Sequence[Block], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Per-block ``(matrices, units)`` values as a ``(units,)`` tensor a parameter."""
    table: dict[str, Tensor] = {}
    for block, value in zip(blocks, values, strict=True):
        for view, part in zip(block.views, value.chunk(len(block.views)), strict=True):
            table[view.name] = part.reshape(-1)
    return table


def span_of_edits(weights: Sequence[Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
    """The weights seen through R: what stands for them when edits are estimated, ``residual`` numbers a unit."""
    return [W @ R for W, R in zip(weights, matrices, strict=True)]


def protected_rows(state: DomainState, guard: Guard) -> list[Tensor | None]:
    """Choose a domain's protected units; sets its `protected_set` and `half_set`.

    Returns:
        Per block the flattened indices of the chosen units, or None for all.
    """
    config, views = guard.config, guard.view.layout.views
    energies = by_parameter(guard.view.blocks, [sums.energy for sums in state.curvature.sums])
    state.half_set = select_units(energies, views, 0.5)
    if config.coverage >= 1:
        state.protected_set = select_units(energies, views, 1.0)
        return [None for _ in guard.view.blocks]
    chosen = select_units(energies, views, config.coverage)
    if config.selection == "random":
        generator = torch.Generator().manual_seed(config.seed)
        chosen = random_units(chosen, energies, views, generator)
    elif config.selection == "edits" and state.start is not None:
        now = span_of_edits(guard.view.weights(), guard.view.residuals)
        moved = [(a - b).square().sum(-1) for a, b in zip(now, state.start, strict=True)]
        chosen = select_units(by_parameter(guard.view.blocks, moved), views, config.coverage)
    state.protected_set = chosen
    return rows_of(chosen, guard.view.blocks, guard.device)


def rows_of(chosen: ProtectedSet, blocks: Sequence[Block], device: torch.device) -> list[Tensor | None]:
    """A protected set as flattened unit indices per block."""
    rows: list[Tensor | None] = []
    for block in blocks:
        mask = torch.cat([chosen.masks[view.name] for view in block.views])
        rows.append(None if bool(mask.all()) else mask.nonzero().flatten().to(device))
    return rows
