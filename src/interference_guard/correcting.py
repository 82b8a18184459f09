"""Brings the displacements of all protected domains inside their radii, by cyclic passes over the domains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .local_block import Correction
from .local_model import Displacement, LocalModel
from .projection import shrinkage

# Excess over the radius that a sweep after the first leaves alone; the promise for several domains is 1.05.
SLACK = 1.02

Grams = dict[tuple[int, int], list[Tensor]]


def project(
    models: Sequence[LocalModel],
    displacements: Sequence[Displacement],
    energies: Tensor,
    radii: Sequence[Tensor],
    sweeps: int,
    grams: Grams | None = None,
    metrics: Sequence[Tensor] | None = None,
) -> list[Correction] | None:
    """Bring the displacement of every domain inside its radius, by cyclic passes.

    One domain is served exactly by one pass; with several, a later domain's correction can push an
    earlier one out again by a little, which further sweeps reduce.

    Args:
        models: The protected domains' local models.
        displacements: Their displacements; `flat` is changed in place to what the correction leaves, and what
            was removed for the domain's own sake becomes `taken`.
        energies: Of the displacements, ``(domains,)`` fp32.
        radii: 0-d fp32 tensors.
        sweeps: Most passes over the domains.
        grams: Products of the models' directions by their `id`, kept from call to call; filled in place.
        metrics: What a change of each coordinate counts, by domain like `Displacement.flat`, from one metric of
            the units; None counts all alike.

    Returns:
        Per block the change to subtract from the weights (from this rank's part of them), or None when nothing is
        outside.
    """
    bounds = torch.stack(list(radii))
    # One number, which saves all else where none is outside.
    if (energies <= bounds).all().item():
        return None
    grams, allowed = {} if grams is None else grams, bounds.tolist()
    for sweep in range(sweeps if len(models) > 1 else 1):
        # A later sweep need only mend what other corrections pushed out noticeably.
        slack = 1.0 if sweep == 0 else SLACK
        still = True
        for i, (seen, radius) in enumerate(zip(displacements, radii, strict=True)):
            if seen.energy().item() <= allowed[i] * slack:
                continue
            still = False
            metric = None if metrics is None else metrics[i]
            change = seen.flat * (1 - shrinkage(seen.flat, seen.weights, radius, metric))
            seen.flat.sub_(change)
            seen.taken = change if seen.taken is None else seen.taken.add_(change)
            parts = seen.split(change)
            for j, other in enumerate(displacements):
                if j != i:
                    _push(parts, models[i], models[j], other, grams)
        if still:
            break
    moved = [
        (model, seen.split(seen.taken))
        for model, seen in zip(models, displacements, strict=True)
        if seen.taken is not None
    ]
    if not moved:
        return None
    changes = []
    for b in range(len(models[0].blocks)):
        coefficients = [model.blocks[b].scatter(parts[b]) for model, parts in moved]
        directions = [model.blocks[b].directions() for model, _ in moved]
        block = models[0].blocks[b]
        if len(moved) == 1:
            changes.append(block.correction(coefficients[0], directions[0]))
        else:
            changes.append(block.correction(torch.cat(coefficients, -1), torch.cat(directions, -1)))
    return changes


def _push(
    parts: Sequence[Tensor], mine: LocalModel, theirs: LocalModel, other: Displacement, grams: Grams
) -> None:
    """What a correction in one domain's directions does to another's coordinates, in place."""
    key = (id(mine), id(theirs))
    if key not in grams:
        grams[key] = [a.U.mT @ b.U for a, b in zip(mine.blocks, theirs.blocks, strict=True)]
    for part, view, a, b, gram in zip(parts, other.views, mine.blocks, theirs.blocks, grams[key], strict=True):
        if a.rows is None and b.rows is None:
            matrices = a.energy.shape[0]
            view.view(matrices, -1, b.rank).baddbmm_(part.view(matrices, -1, a.rank), gram, alpha=-1)
        else:
            view.sub_(b.select(a.scatter(part) @ gram))
