"""Which units a domain's protection covers: the smallest set that carries its curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .exact import SINGLE_ONLY
from .units import UnitView


@dataclass(frozen=True)
class ProtectedSet:
    """Chosen units by parameter.

    Args:
        masks: Canonical parameter name to a bool tensor ``(units,)`` on the CPU.
    """

    masks: Mapping[str, Tensor]

    @cached_property
    def share(self) -> float:
        """Part of all units that is protected."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(int(mask.sum()) for mask in self.masks.values()) / max(total, 1)

    def overlap(self, other: ProtectedSet) -> float:
        """Jaccard index of two sets over the same parameters: common units by united units."""
        return jaccard(self.masks, other.masks)


def jaccard(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Common members over united members of two sets of masks; 0 where both are empty.

    Examples:
        >>> jaccard({"a": torch.tensor([True, True])}, {"a": torch.tensor([True, False])})
        0.5
    """
    both = sum(int((mask & second[name]).sum()) for name, mask in first.items())
    either = sum(int((mask | second[name]).sum()) for name, mask in first.items())
    return both / max(either, 1)


def select_units(scores: Mapping[str, Tensor], views: Mapping[str, UnitView], coverage: float) -> ProtectedSet:
    """Choose the smallest set of neurons and other units that covers a part of the summed scores.

    The gate row, up row and down column of an MLP channel are one candidate (a neuron), with the sum of
    their scores; every other unit is one of its own.

    Args:
        scores: Canonical parameter name to a score per unit, ``(units,)``, never negative.
        views: The unit views of the same parameters.
        coverage: Part of the total score to cover, in (0, 1].

    Returns:
        The chosen units. At coverage 1 these are all of them, those with score 0 included.
    """
    if coverage >= 1:
        whole = {name: torch.ones(len(score), dtype=torch.bool, device="cpu") for name, score in scores.items()}
        return ProtectedSet(whole)
    members, totals = _candidates(scores, views)
    # Put in order where the scores lie: the CPU takes seconds for the millions of units of many experts. It keeps
    # the sums: on an accelerator their last bits may differ from rank to rank.
    device = next(iter(scores.values())).device
    there = totals.cpu() if device.type in SINGLE_ONLY else totals.to(device)
    order = there.argsort(descending=True, stable=True).cpu()
    ranked = totals[order]
    before = ranked.cumsum(0) - ranked
    return _chosen(members, totals, order[before < coverage * totals.sum()])


def random_units(
    like: ProtectedSet,
    scores: Mapping[str, Tensor],
    views: Mapping[str, UnitView],
    generator: torch.Generator,
) -> ProtectedSet:
    """As many neurons and other units as `like` has, drawn at random: the control of every selection."""
    members, totals = _candidates(scores, views)
    inside = torch.zeros(len(totals), dtype=torch.bool, device="cpu")
    for name, mask in like.masks.items():
        inside[members[name][mask]] = True
    order = torch.randperm(len(totals), generator=generator, device="cpu")
    return _chosen(members, totals, order[: int(inside.sum())])


def _candidates(scores: Mapping[str, Tensor], views: Mapping[str, UnitView]) -> tuple[dict[str, Tensor], Tensor]:
    """Each unit's candidate number, by parameter, and the candidates' summed scores (fp64, CPU)."""
    groups: dict[str, int] = {}
    members: dict[str, Tensor] = {}
    count = 0
    for name, score in scores.items():
        index = views[name].neuron_index()
        if index is None:
            members[name] = torch.arange(count, count + len(score), device="cpu")
            count += len(score)
            continue
        group = views[name].neuron
        assert group is not None
        if group not in groups:
            groups[group] = count
            count += int(index.max()) + 1
        members[name] = index.cpu() + groups[group]
    totals = torch.zeros(count, dtype=torch.float64, device="cpu")
    for name, score in scores.items():
        totals.index_add_(0, members[name], score.detach().cpu().double())
    return members, totals


def _chosen(members: Mapping[str, Tensor], totals: Tensor, candidates: Tensor) -> ProtectedSet:
    keep = torch.zeros(len(totals), dtype=torch.bool, device="cpu")
    keep[candidates] = True
    return ProtectedSet({name: keep[index] for name, index in members.items()})
