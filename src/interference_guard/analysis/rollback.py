"""Training-free rollback: take back the part of an edit that costs an earlier domain most per unit of edit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from interference_guard.errors import ConfigError

from .checkpoints import Advance, Checkpoint, Weights
from .part import Part, Seen, displacement
from .state import DomainRecord

MODES = ("directions", "units")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


@dataclass
class RollbackPlan:
    """Every unit's predicted interference and edit, and so the order in which units are rolled back.

    Args:
        record: The domain to restore.
        before: Weights before the edit.
        after: Weights after it.
        mode: ``"units"`` takes back a unit's whole edit, ``"directions"`` only its part along the domain's
            directions.
        interference: Predicted interference that taking a unit back fully removes, by parameter, ``(units,)``.
        edit: Squared length of what is taken back then, by parameter, ``(units,)``.
        whole_interference: Predicted interference of the whole edit, raw.
        whole_edit: Squared length of the whole edit.
    """

    record: DomainRecord
    before: Weights
    after: Checkpoint
    mode: str
    interference: dict[str, Tensor]
    edit: dict[str, Tensor]
    whole_interference: float
    whole_edit: float

    def chosen(self, share: float) -> dict[str, Tensor]:
        """The first units of the order, as bool masks ``(units,)`` by parameter.

        Args:
            share: Part of the units whose edit is not zero.

        Raises:
            ConfigError: If it is not above 0 and at most 1.
        """
        check_amounts(share=share)
        interference, edit = torch.cat(list(self.interference.values())), torch.cat(list(self.edit.values()))
        score = torch.where(edit > 0, interference / edit.clamp(min=torch.finfo(edit.dtype).tiny), 0.0)
        count = min(round(share * int((edit > 0).sum())), int((score > 0).sum()))
        mask = torch.zeros(len(score), dtype=torch.bool, device=score.device)
        mask[score.argsort(descending=True, stable=True)[:count]] = True
        parts = torch.split(mask, [len(item) for item in self.interference.values()])
        return dict(zip(self.interference, parts, strict=True))

    def check(self, share: float, strength: float) -> None:
        """Refuse a rollback that cannot be, or would change nothing.

        Raises:
            ConfigError: If a value is out of range, or no unit is chosen.
        """
        found = self.predict(share, strength)
        if found["units"]:
            return
        count = sum(int((item > 0).sum()) for item in self.edit.values())
        if not self.predict(1.0, strength)["units"]:
            raise ConfigError(
                f"No unit's edit is predicted to cost {self.record.name!r} anything, so there is nothing to take "
                "back. Give another domain, or the checkpoint from before the edit as BASE."
            )
        raise ConfigError(
            f"share={share!r} of the {count} edited units is less than one, so nothing would be taken back. Give "
            f"at least {1 / count:.2g}."
        )

    def predict(self, share: float, strength: float) -> dict[str, float]:
        """What a rollback is predicted to do, before the result is rounded to the checkpoint's dtype.

        Returns:
            ``interference_left`` and ``edit_left``, parts of the edit's predicted interference and of its squared
            length that stay, and the number of ``units``.
        """
        check_amounts(share=share, strength=strength)
        masks = self.chosen(share)
        removed = sum(float(self.interference[name][mask].sum()) for name, mask in masks.items())
        taken = sum(float(self.edit[name][mask].sum()) for name, mask in masks.items())
        factor, whole = 1 - (1 - strength) ** 2, self.whole_interference
        return {
            "share": share,
            "strength": strength,
            "units": float(sum(int(mask.sum()) for mask in masks.values())),
            "interference_left": 1 - factor * removed / whole if whole else 0.0,
            "edit_left": 1 - factor * taken / self.whole_edit if self.whole_edit else 1.0,
        }

    def curve(self, strength: float = 1.0) -> list[dict[str, float]]:
        """`predict` for each of `SHARES`."""
        return [self.predict(share, strength) for share in SHARES]


def plan_rollback(
    record: DomainRecord,
    before: Weights,
    after: Checkpoint,
    mode: str = "directions",
    advance: Advance = lambda name: None,
) -> RollbackPlan:
    """Score every unit by predicted interference per squared length of its edit.

    Args:
        record: The domain to restore, with a local model.
        before: Weights before the edit, best those at the domain's anchor.
        after: Weights after it.
        mode: One of `MODES`.
        advance: Called with each parameter's name when it is done.

    Raises:
        ConfigError: If the mode is unknown.
        CheckpointError: If the checkpoints are not of the state's model.
        UnknownDomainError: If the domain has no local model.
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is not allowed: it must be one of {list(MODES)}.")
    interference, edit, whole_interference, whole_edit = {}, {}, 0.0, 0.0
    for part, seen in see_edit(record, before, after):
        inside, outside = part.interference(seen)
        whole_interference += float(inside.double().sum() + outside.double().sum())
        whole_edit += float(seen.lengths.sum())
        name = part.view.name
        if mode == "units":
            interference[name], edit[name] = (inside + outside).double(), seen.lengths
        else:
            interference[name] = inside.double()
            edit[name] = seen.z.double().square().sum(-1).flatten()
        advance(name)
    return RollbackPlan(record, before, after, mode, interference, edit, whole_interference, whole_edit)


def see_edit(record: DomainRecord, before: Weights, after: Weights) -> Iterator[tuple[Part, Seen]]:
    """An edit parameter by parameter, as the domain's local model sees it."""
    end, start = record.state.running(after), record.state.running(before)
    for part in record.parts():
        yield part, part.see(displacement(part.view.name, end, before=start))


def check_amounts(**values: float) -> None:
    """Refuse a share, or a strength, of which there is none.

    Raises:
        ConfigError: If one is not above 0 and at most 1.
    """
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ConfigError(f"{name}={value!r} is not allowed: it must be a number above 0 and at most 1.")
