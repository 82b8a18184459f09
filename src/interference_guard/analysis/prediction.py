"""The interference a displacement costs a domain, predicted from the guard's state, and where it sits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from interference_guard.files import DETAILS
from interference_guard.places import place_label
from interference_guard.trust_region import Raw
from interference_guard.units import UnitView

from .checkpoints import Advance, Checkpoint, Weights
from .edits import neuron_sums
from .part import Read, displacement
from .state import DomainRecord


@dataclass
class Prediction:
    """Predicted interference of one domain.

    Args:
        domain: The domain.
        inside: Raw prediction in the domain's directions by parameter and unit, ``(units,)`` fp32 each.
        outside: Raw prediction outside of them by parameter and unit, ``(units,)`` fp32 each.
        views: The parameters' unit views.
        calibrated: In parts of the domain's reward range (or nats a token); NaN before a measurement. Since the
            anchor, or from `before` on where that was given.
        moved_at: Steps of other domains after the anchor at which the region was moved; 0 where it was not.
    """

    domain: str
    inside: dict[str, Tensor]
    outside: dict[str, Tensor]
    views: dict[str, UnitView]
    calibrated: float
    moved_at: int = 0

    @property
    def raw(self) -> float:
        """The raw prediction: a sum over all units."""
        return sum(float(part.double().sum()) for group in (self.inside, self.outside) for part in group.values())

    @property
    def units(self) -> dict[str, Tensor]:
        """Both parts together, ``(units,)`` by parameter."""
        return {name: part + self.outside[name] for name, part in self.inside.items()}

    def by_place(self) -> dict[str, float]:
        """Raw prediction by ``layer.module``."""
        found: dict[str, float] = {}
        for name, values in self.units.items():
            key = place_label(name)
            found[key] = found.get(key, 0.0) + float(values.double().sum())
        return found

    def neurons(self) -> dict[str, Tensor]:
        """Raw prediction of each neuron by MLP."""
        return neuron_sums(self.units, self.views)


def predict_interference(
    record: DomainRecord,
    after: Weights,
    *,
    before: Weights | None = None,
    advance: Advance = lambda name: None,
) -> Prediction:
    """Predict what a displacement costs a domain: 1/2 d' H d by the domain's local model.

    Where the domain's region was moved (`renew`), that is where the displacement starts by default, and what was
    lost up to there is added. Such a prediction is meant for later checkpoints alone: of an earlier one, the
    domain's own anchor included, it says nothing.

    Args:
        record: The domain, from a state file.
        after: The displaced weights.
        before: Where the displacement starts; the centre of the domain's region by default, which is its own
            anchor unless the region was moved.
        advance: Called with each parameter's name when it is done.

    Raises:
        CheckpointError: If the checkpoints are not of the state's model.
        UnknownDomainError: If the domain has no local model.

    Reference:
        Yang et al., 2026, arXiv:2606.02398, without its first-order term and with an isotropic rest.
    """
    there = record.state.running(after)
    start = None if before is None else record.state.running(before)
    return _predicted(record, lambda name: displacement(name, there, before=start), before is None, advance)


def before_move(record: DomainRecord, weights: Weights) -> bool:
    """Whether the state saved beside a checkpoint says that it is from before the domain's region was moved."""
    if not record.moved_at:
        return False
    # Of an adapter over its base: the adapter's.
    path = weights.paths[-1]
    try:
        text = ((path if path.is_dir() else path.parent) / DETAILS).read_text(encoding="utf-8")
        domains = json.loads(text)["domains"]
        # Counted over the whole run, which may not have met the domain yet.
        return record.name not in domains or int(domains[record.name]["renewals"]) < int(
            record.details["renewals"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def predict_rounding(record: DomainRecord, weights: Checkpoint) -> Prediction:
    """Predict what errors cost a domain that are as large as rounding makes to the dtype of its weights.

    A guard that trains fp32 weights has an anchor that a checkpoint in bf16 can only come near.

    Args:
        record: The domain, from a state file.
        weights: The rounded weights.

    Raises:
        CheckpointError: If they are not of the state's model.
        UnknownDomainError: If the domain has no local model.
    """
    running = record.state.running(weights)
    generator = torch.Generator().manual_seed(0)

    def errors(name: str) -> Read:
        stored = running.sources[name].names[0][0]
        step = torch.finfo(weights.entries[stored].dtype or torch.float32).eps

        def read(first: int, last: int) -> Tensor:
            rows = running.rows(name, first, last)
            drawn = torch.rand(rows.shape, generator=generator, device="cpu")
            return rows.mul_(drawn.sub_(0.5).mul_(step))

        return read

    return _predicted(record, errors, False)


def _predicted(
    record: DomainRecord, reads: Callable[[str], Read], anchored: bool, advance: Advance = lambda name: None
) -> Prediction:
    inside, outside, views = {}, {}, {}
    for part in record.parts():
        name = part.view.name
        inside[name], outside[name] = part.interference(part.see(reads(name), anchored=anchored))
        views[name] = part.view
        advance(name)
    sums = [sum(float(item.double().sum()) for item in group.values()) for group in (inside, outside)]
    # The first-order term of a run that has one is left out here.
    whole = record.region.predict(Raw(*sums), first_order=False)
    calibrated = whole if anchored else record.region.slope * sum(sums)
    return Prediction(record.name, inside, outside, views, calibrated, record.moved_at)
