"""Training-free rollback: take back the part of an edit that costs an earlier domain most per unit of edit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from interference_guard.errors import CheckpointError, ConfigError, ReportError
from interference_guard.files import DETAILS, TENSORS

from .checkpoints import Checkpoint, Weights
from .state import DomainRecord, Part

MODES = ("directions", "units")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
# A trainer's own state would no longer fit the weights.
LEFT_OUT = ("optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "scaler", "pytorch_model")
Advance = Callable[[str], None]


@dataclass
class RollbackPlan:
    """Every unit's predicted interference and edit, and so the order in which units are rolled back.

    Args:
        record: The domain to restore.
        before: Weights before the edit.
        after: Weights after it.
        mode: ``"units"`` takes back a unit's whole edit, ``"directions"`` only its part along the domain's
            directions.
        damage: Predicted interference that taking a unit back fully removes, by parameter, ``(units,)``.
        edit: Squared length of what is taken back then, likewise.
        whole_damage: Predicted interference of the whole edit, raw.
        whole_edit: Squared length of the whole edit.
    """

    record: DomainRecord
    before: Weights
    after: Checkpoint
    mode: str
    damage: dict[str, Tensor]
    edit: dict[str, Tensor]
    whole_damage: float
    whole_edit: float

    def chosen(self, share: float) -> dict[str, Tensor]:
        """The first units of the order, as bool masks ``(units,)`` by parameter.

        Args:
            share: Part of the units whose edit is not zero.

        Raises:
            ConfigError: If it is not above 0 and at most 1.
        """
        _check(share=share)
        damage, edit = torch.cat(list(self.damage.values())), torch.cat(list(self.edit.values()))
        score = torch.where(edit > 0, damage / edit.clamp(min=torch.finfo(edit.dtype).tiny), 0.0)
        count = min(round(share * int((edit > 0).sum())), int((score > 0).sum()))
        mask = torch.zeros(len(score), dtype=torch.bool)
        mask[score.argsort(descending=True, stable=True)[:count]] = True
        parts = torch.split(mask, [len(item) for item in self.damage.values()])
        return dict(zip(self.damage, parts, strict=True))

    def predict(self, share: float, strength: float) -> dict[str, float]:
        """What a rollback is predicted to do.

        Returns:
            ``damage_left`` and ``edit_left``, parts of the edit's predicted interference and of its squared
            length that stay, and the number of ``units``.
        """
        _check(share=share, strength=strength)
        masks = self.chosen(share)
        removed = sum(float(self.damage[name][mask].sum()) for name, mask in masks.items())
        taken = sum(float(self.edit[name][mask].sum()) for name, mask in masks.items())
        factor = 1 - (1 - strength) ** 2
        return {
            "share": share,
            "strength": strength,
            "units": float(sum(int(mask.sum()) for mask in masks.values())),
            "damage_left": 1 - factor * removed / self.whole_damage if self.whole_damage else 0.0,
            "edit_left": 1 - factor * taken / self.whole_edit if self.whole_edit else 1.0,
        }

    def curve(self, strength: float = 1.0, shares: Sequence[float] = SHARES) -> list[dict[str, float]]:
        """`predict` over several shares."""
        return [self.predict(share, strength) for share in shares]


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
    names = record.state.names(after)
    record.state.names(before)
    damage, edit, whole_damage, whole_edit = {}, {}, 0.0, 0.0
    for part in record.parts():
        there = names[part.view.name]
        new, old = after.rows(there), before.rows(there)
        inside, outside = part.damage(new, old)
        D = part.stack(new) - part.stack(old)
        lengths = D.double().square().sum(-1).flatten()
        whole_damage += float(inside.double().sum() + outside.double().sum())
        whole_edit += float(lengths.sum())
        name = part.view.name
        if mode == "units":
            damage[name], edit[name] = (inside + outside).double(), lengths
        else:
            damage[name] = inside.double()
            edit[name] = (D @ part.block.U).double().square().sum(-1).flatten()
        advance(name)
    return RollbackPlan(record, before, after, mode, damage, edit, whole_damage, whole_edit)


def write_rollback(
    plan: RollbackPlan,
    share: float,
    strength: float,
    out: str | Path,
    *,
    force: bool = False,
    advance: Advance = lambda name: None,
) -> dict[str, float]:
    """Write a checkpoint in which the chosen units are rolled back; everything else is copied.

    Args:
        plan: From `plan_rollback`.
        share: Part of the edited units to roll back, those of highest score first.
        strength: Part of their edit that is taken back; 1 is all of it.
        out: The new folder. The trainer's own state (optimizer, scheduler, random generators) and the
            guard's are not copied, since they belong to the weights as they were.
        force: Replace an existing folder.
        advance: Called with each changed parameter's name.

    Returns:
        What `RollbackPlan.predict` says of it.

    Raises:
        ReportError: If `out` exists and `force` is not set, or is the source itself.
        CheckpointError: If it cannot be written.
    """
    predicted, masks = plan.predict(share, strength), plan.chosen(share)
    target, source = Path(out), plan.after.path
    _check_target(target, source, plan.before, force)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for file in [source] if source.is_file() else sorted(source.iterdir()):
            if file.is_file() and file.name not in (DETAILS, TENSORS) and not file.name.startswith(LEFT_OUT):
                shutil.copyfile(file, temporary / file.name)
        names = plan.record.state.names(plan.after)
        for part in plan.record.parts():
            mask = masks[part.view.name]
            if bool(mask.any()):
                _patch(plan, part, mask, names[part.view.name], strength, temporary)
                advance(part.view.name)
        if target.exists():
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error}. Free space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return predicted


def _patch(plan: RollbackPlan, part: Part, mask: Tensor, name: str, strength: float, folder: Path) -> None:
    """Overwrite one tensor's bytes in the copy."""
    new = plan.after.rows(name)
    seen = part.stack(new)
    D = seen - part.stack(plan.before.rows(name))
    if plan.mode == "directions":
        D = D @ part.block.U @ part.block.U.mT
    # `seen` is a view of `new`: the change lands in the tensor's own layout.
    seen.sub_(D * mask.view(seen.shape[0], -1, 1), alpha=strength)
    entry = plan.after.entries[name]
    assert entry.dtype is not None
    data = new.to(entry.dtype).contiguous().flatten().view(torch.uint8)
    with (folder / entry.path.name).open("r+b") as file:
        file.seek(entry.start)
        file.write(data.numpy().tobytes())


def _check_target(target: Path, source: Path, before: Weights, force: bool) -> None:
    taken = {source.resolve(), *source.resolve().parents, Path(before.label).resolve()}
    if target.resolve() in taken:
        raise ReportError(
            f"{target} is, or holds, the checkpoint that is read. Choose another folder for the result."
        )
    if target.exists() and not force:
        raise ReportError(f"{target} exists already. Choose another folder, or pass --force to replace it.")


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ConfigError(f"{name}={value!r} is not allowed: it must be a number above 0 and at most 1.")
