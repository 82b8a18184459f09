"""Brings the displacements of all protected domains inside their radii, by cyclic passes over the domains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .local_block import Correction
from .local_model import Displacement, LocalModel, runs
from .projection import shrinkage

# Excess over the radius that a sweep after the first leaves alone; the promise for several domains is 1.05.
SLACK = 1.02


class Overlap(NamedTuple):
    """What two domains' directions have in common in blocks that lie side by side in both displacements.

    Args:
        blocks: Their indices; several where all units of all of them are protected and they have one shape.
        gram: U' of one domain times U of the other, ``(matrices of all of them, rank, rank)`` fp32.
    """

    blocks: list[int]
    gram: Tensor


Grams = dict[tuple[LocalModel, LocalModel], list[Overlap]]
"""By the models themselves, which an entry keeps alive: the id of one that is gone may be another's."""


def project(
    models: Sequence[LocalModel],
    displacements: Sequence[Displacement],
    energies: Tensor,
    radii: Sequence[Tensor],
    sweeps: int,
    grams: Grams,
    metrics: Sequence[Tensor] | None,
) -> Iterator[Correction] | None:
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
        grams: Products of the models' directions, kept from call to call; filled in place.
        metrics: What a change of each coordinate counts, by domain like `Displacement.flat`, from one metric of
            the units; None counts all alike.

    Returns:
        Per block, each made when it is asked for, the change to subtract from the weights (from this rank's part
        of them), or None when nothing is outside.
    """
    # The device is read once, which is all where none is outside.
    now, allowed = torch.stack([energies, torch.stack(list(radii))]).tolist()
    if all(energy <= bound for energy, bound in zip(now, allowed, strict=True)):
        return None
    untouched = True
    for sweep in range(sweeps if len(models) > 1 else 1):
        # A later sweep need only mend what other corrections pushed out noticeably.
        slack = 1.0 if sweep == 0 else SLACK
        still = True
        for i, (seen, radius) in enumerate(zip(displacements, radii, strict=True)):
            # What was given holds until the first correction.
            if (now[i] if untouched else seen.energy().item()) <= allowed[i] * slack:
                continue
            still = untouched = False
            metric = None if metrics is None else metrics[i]
            change = seen.flat * (1 - shrinkage(seen.flat, seen.weights, radius, metric))
            seen.flat.sub_(change)
            seen.taken = change if seen.taken is None else seen.taken.add_(change)
            for j, other in enumerate(displacements):
                if j != i:
                    _push(change, models[i], models[j], other, grams)
        if still:
            break
    moved = [
        (model, model.views(seen.taken))
        for model, seen in zip(models, displacements, strict=True)
        if seen.taken is not None
    ]
    if not moved:
        return None
    return _corrections(moved)


def _corrections(moved: Sequence[tuple[LocalModel, Sequence[Tensor]]]) -> Iterator[Correction]:
    """What the domains' corrections come to in each block; all of them at once would be many times their size."""
    for b, block in enumerate(moved[0][0].blocks):
        coefficients = [model.blocks[b].scatter(parts[b]) for model, parts in moved]
        directions = [model.blocks[b].directions() for model, _ in moved]
        if len(moved) == 1:
            yield block.correction(coefficients[0], directions[0])
        else:
            yield block.correction(torch.cat(coefficients, -1), torch.cat(directions, -1))


def _push(change: Tensor, mine: LocalModel, theirs: LocalModel, other: Displacement, grams: Grams) -> None:
    """What a correction in one domain's directions does to another's coordinates, in place."""
    key = (mine, theirs)
    if key not in grams:
        grams[key] = _overlaps(mine, theirs)
    for blocks, gram in grams[key]:
        first = blocks[0]
        a, b = mine.blocks[first], theirs.blocks[first]
        matrices, units = len(gram), a.energy.shape[1]
        part, view = mine.part(change, blocks), theirs.part(other.flat, blocks)
        if a.rows is None and b.rows is None:
            view.view(matrices, units, -1).baddbmm_(part.view(matrices, units, -1), gram, alpha=-1)
        else:
            view.view(-1, b.rank).sub_(b.select(a.scatter(part.view(-1, a.rank)) @ gram))


def _overlaps(mine: LocalModel, theirs: LocalModel) -> list[Overlap]:
    """Products of two domains' directions, of neighbours of one shape together."""

    def shape(index: int) -> tuple[int, ...] | None:
        a, b = mine.blocks[index], theirs.blocks[index]
        whole = a.rows is None and b.rows is None
        return (a.energy.shape[1], a.width, a.rank, b.rank) if whole else None

    return [
        Overlap(run, torch.cat([mine.blocks[index].U.mT @ theirs.blocks[index].U for index in run]))
        for run in runs(mine.order, shape)
    ]
