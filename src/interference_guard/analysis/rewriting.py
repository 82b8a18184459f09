"""The checkpoint a rollback writes: a copy in which the chosen units' bytes are others."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from interference_guard.errors import CheckpointError
from interference_guard.files import beside
from interference_guard.rounding import round_at_random

from .checkpoints import Advance, open_checkpoint, pieces, stored_twice
from .copying import copy_files, copy_of
from .part import Part, displacement
from .pieces import Piece, matrix_shape, unit_pieces
from .rollback import RollbackPlan, see_edit
from .running import Running
from .target import check_target, put_in_place
from .tensorfile import Entry


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
            guard's, with its history, report and section of the model card, are not copied, since they belong to
            the weights as they were.
        force: Replace an existing checkpoint.
        advance: Called with each changed parameter's name.

    Returns:
        As `RollbackPlan.predict`, with `interference_left` and `edit_left` of what was written: bf16 is rounded
        at random, with bits that depend on the state's seed alone, and fp16 to the nearest number.

    Raises:
        ConfigError: If a value is out of range, or no unit would be rolled back.
        ReportError: If `out` exists and `force` is not set, holds something else than one checkpoint, or is, or
            holds, what is read.
        CheckpointError: If it cannot be written.
    """
    plan.check(share, strength)
    # Whole: "." has no name that a folder beside it could be called by.
    target, source = Path(os.path.abspath(out)), plan.after.path
    check_target(target, (*plan.after.paths, *plan.before.paths, plan.record.state.folder), force=force)
    temporary = beside(target)
    try:
        temporary.mkdir(parents=True)
        copy_files(plan.after, temporary)
        _rewrite(plan, share, strength, temporary, advance)
        found = plan.predict(share, strength) | _left(
            plan, temporary / source.name if source.is_file() else temporary
        )
        put_in_place(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error}. Free space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def _left(plan: RollbackPlan, written: Path) -> dict[str, float]:
    """What the written weights have of the edit's interference and squared length."""
    interference, edit = 0.0, 0.0
    for part, seen in see_edit(plan.record, plan.before, open_checkpoint(written)):
        interference += sum(float(item.double().sum()) for item in part.interference(seen))
        edit += float(seen.lengths.sum())
    return {
        "interference_left": interference / plan.whole_interference if plan.whole_interference else 0.0,
        "edit_left": edit / plan.whole_edit if plan.whole_edit else 1.0,
    }


def _rewrite(plan: RollbackPlan, share: float, strength: float, folder: Path, advance: Advance) -> None:
    masks = plan.chosen(share)
    after, before = (plan.record.state.running(weights) for weights in (plan.after, plan.before))
    # Of the seed alone: the same command writes the same bytes.
    generator = torch.Generator().manual_seed(plan.record.state.settings["seed"])
    for part in plan.record.parts():
        name = part.view.name
        if bool(masks[name].any()):
            change = _Change(plan, part, after, before, strength)
            change.write(folder, masks[name].view(matrix_shape(part.view)), generator)
            advance(name)
    pair = stored_twice(plan.after)
    # A guard sees tied weights once, by the embedding's name.
    if pair is not None and pair[0] in after.saved and pair[1] not in after.saved:
        embedding, head = (plan.after.entries[name] for name in pair)
        written = [
            replace(entry, path=copy_of(entry.path, plan.after.path, folder)) for entry in (embedding, head)
        ]
        _copy_head(embedding, head, *written)


def _copy_head(embedding: Entry, head: Entry, changed: Entry, copy: Entry) -> None:
    """Write a changed embedding over the copy of it that is stored as the head, where that was a copy."""
    rows = list(pieces(embedding.shape))
    if not all(torch.equal(embedding.read(*piece), head.read(*piece)) for piece in rows):
        return
    with copy.path.open("r+b") as file:
        file.seek(head.start)
        for piece in rows:
            file.write(_bytes(changed.read(*piece).to(head.dtype)))


def _bytes(rows: Tensor) -> bytes:
    return rows.contiguous().flatten().view(torch.uint8).numpy().tobytes()


class _Change:
    """What a rollback does to one parameter."""

    def __init__(self, plan: RollbackPlan, part: Part, after: Running, before: Running, strength: float) -> None:
        self.part, self.strength = part, strength
        self.checkpoint, self.before = plan.after, before
        self.source = after.sources[part.view.name]
        # Rows that hold a part of every unit need all of a unit's coordinates first.
        self.z: Tensor | None = None
        if plan.mode == "directions":
            self.z = part.see(displacement(part.view.name, after, before=before)).z

    def write(self, folder: Path, mask: Tensor, generator: torch.Generator) -> None:
        """Overwrite the chosen units ``(matrices, units)`` in the copy, piece by piece."""
        entries = self.checkpoint.entries
        for piece in unit_pieces(self.part.view):
            chosen = piece.part(mask).unsqueeze(-1)
            if not bool(chosen.any()):
                continue
            stored = self.source.read(lambda name, *rows: entries[name].read(*rows), piece.first, piece.last)
            wanted = self._wanted(piece, stored.to(torch.float32, copy=True))
            if stored.dtype == torch.bfloat16:
                rounded = round_at_random(wanted, generator)
            else:
                rounded = wanted.to(stored.dtype)
            # A view of `stored`: the change lands in the parameter's own layout, and other units keep their bits.
            seen = piece.view(stored)
            seen.copy_(torch.where(chosen, piece.view(rounded), seen))
            for name, first, rows in self.source.split(stored, piece.first, self.checkpoint.shapes):
                self._put(entries[name], folder, first, rows)

    def _put(self, entry: Entry, folder: Path, first: int, rows: Tensor) -> None:
        """Write rows from `first` on into the copy of a tensor."""
        with copy_of(entry.path, self.checkpoint.path, folder).open("r+b") as file:
            file.seek(entry.start + first * (entry.size // max(entry.rows, 1)))
            # Experts may be stored in several dtypes; together they are read in the widest.
            file.write(_bytes(rows.to(entry.dtype)))

    def _wanted(self, piece: Piece, rows: Tensor) -> Tensor:
        """A piece's rows with all of its units rolled back, fp32; `rows` is changed in place."""
        seen = piece.view(rows)
        if self.z is None:
            # At full strength the result is the earlier number to the last bit.
            seen.lerp_(piece.view(self.before.rows(self.part.view.name, piece.first, piece.last)), self.strength)
            return rows
        U = self.part.block.U[piece.matrices, piece.width]
        seen.sub_(piece.part(self.z) @ U.mT, alpha=self.strength)
        return rows
