"""The guard's state beside the trainer's own checkpoints, saved and read by every rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from interference_guard.checkpoint import check_weights, load_own
from interference_guard.errors import ConfigError, GuardError, StateError
from interference_guard.files import DETAILS
from interference_guard.guard import Guard
from interference_guard.telling import warn
from interference_guard.written import withdraw

from .seams import Seams

RESUMED = (
    "transformers' Trainer does not read all that it saves: of models with experts, of some with pictures, and "
    "in some versions of an adapter that has TRL's 'ref' beside it (beta above 0). Build the model from the "
    "checkpoint before you resume from it, by from_pretrained(CHECKPOINT), or PeftModel.from_pretrained(base, "
    "CHECKPOINT, is_trainable=True). Where this is not the reason, resume from another checkpoint."
)


class Checkpoints:
    """Saves and reads the guard's state where the trainer saves and reads its optimizer's.

    Args:
        seams: The trainer's methods, to be wrapped.
        guard: Its state is saved.
        bind: Called before a state is read: the trainer may have sharded the model by then.
    """

    def __init__(self, seams: Seams, guard: Guard, bind: Callable[[], None]) -> None:
        self.trainer, self.guard, self._bind = seams.trainer, guard, bind
        self._failed: Exception | None = None
        self._read_before = False
        args = self.trainer.args
        if args.save_only_model and getattr(args.save_strategy, "value", args.save_strategy) != "no":
            warn(
                "save_only_model=True: the guard's state is not saved with checkpoints, so a resumed run cannot "
                "go on guarded. Set it to False."
            )
        seams.wrap("_save_optimizer_and_scheduler", self._save)
        seams.wrap("_load_optimizer_and_scheduler", self._load)
        seams.wrap("_load_best_model", self._load_best)

    def begin(self) -> None:
        """A call of `train` begins, which reads the checkpoint's weights once."""
        self._read_before = False

    def save(self, directory: str | Path) -> None:
        """Save this rank's part; each rank retains completions, and may hold weights, of its own.

        A step that is over for the trainer is over for the guard too: callbacks that save by themselves, as that
        of `enable_jit_checkpoint` does, may come before the guard's own, and a resumed run begins after it.
        """
        accelerator = self.trainer.accelerator
        place = accelerator.process_index, accelerator.num_processes
        folder = _folder(directory, place[0])
        if self.guard.steps > max(self.guard.asked, 0):
            self.guard.end()
            self.guard.probe()
        self.guard.save(folder, folders=place[1], place=place)

    def load(self, directory: str | Path) -> None:
        """Read what all ranks of a run saved there."""
        accelerator = self.trainer.accelerator
        load_own(self.guard, partial(_folder, directory), accelerator.process_index, accelerator.num_processes)

    def report(self) -> None:
        """Raise the error of a state that could not be written with the last checkpoint."""
        error, self._failed = self._failed, None
        if error is not None:
            raise error

    def report_late(self) -> None:
        """Warn of such an error at the end of a run: what another callback saves is followed by no `on_save`."""
        error, self._failed = self._failed, None
        if error is not None:
            warn(f"The last checkpoint is without the guard's state: {error}")

    def _save(self, method: Any) -> Any:
        def save(directory: str, *args: Any, **kwargs: Any) -> Any:
            # Of an earlier attempt at this step; the weights of this one are written by now. What cannot be
            # deleted cannot be replaced either, which is reported below.
            with contextlib.suppress(StateError):
                withdraw(_folder(directory, self.trainer.accelerator.process_index))
            result = method(directory, *args, **kwargs)
            try:
                self.save(directory)
            except (GuardError, RuntimeError, MemoryError) as error:
                # Raised in on_save, when the trainer's own checkpoint is complete. It may be of a probe, or of
                # memory that is used up.
                self._failed = error
            return result

        return save

    def _load(self, method: Any) -> Any:
        def load(checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
            result = method(checkpoint, *args, **kwargs)
            if checkpoint is not None:
                self._bind()
                self._check_resumed(checkpoint)
                self._read(checkpoint)
            return result

        return load

    def _load_best(self, method: Any) -> Any:
        def load(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            best = self.trainer.state.best_model_checkpoint
            try:
                self._check(best)
                self.load(best)
            except StateError as error:
                # The training is done: its result must not be lost over this.
                warn(
                    f"The trainer has read the weights of {best}, and the guard is still that of the run's end: "
                    f"{error} Use neither for a further phase together."
                )
            return result

        return load

    def _check_resumed(self, checkpoint: str) -> None:
        try:
            self._check(checkpoint)
        except StateError:
            if not self._read_before:
                raise
            warn(
                "auto_find_batch_size=True began again with a smaller batch, at weights that have been trained "
                f"since {checkpoint}. The guard begins again with the state there, of before these steps."
            )
        self._read_before = True

    def _check(self, checkpoint: str) -> None:
        """Raise on all ranks where the weights of any are not those that the state was saved beside."""
        failed = None
        try:
            check_weights(self.guard, _folder(checkpoint, self.trainer.accelerator.process_index), RESUMED)
        except StateError as error:
            failed = error
        if self.guard.ranks.any(failed is not None, self.guard.device):
            raise failed or StateError(
                f"Another rank's weights are not those that its state in {checkpoint} was saved beside; its own "
                "error says more."
            )

    def _read(self, checkpoint: str) -> None:
        try:
            self.load(checkpoint)
        except StateError as error:
            if any(Path(checkpoint).rglob(f"{Path(DETAILS).stem}*")):
                raise
            if self.trainer.args.save_only_model:
                raise StateError(
                    f"{checkpoint} holds no state of the guard: with save_only_model=True a checkpoint is the "
                    "model alone, and neither the optimizer nor the guard goes on from it. Set it to False and "
                    "train from the start, or resume without the guard."
                ) from error
            raise StateError(
                f"{checkpoint} holds no state of the guard ({DETAILS}). Resume from a checkpoint that was saved "
                "with the guard attached, with all of its files. To guard a run that began without it, build the "
                f"trainer with the weights of this one, and call callback.save({checkpoint!r}) before train()."
            ) from error


def _folder(directory: str | Path, rank: int) -> Path:
    if not isinstance(directory, str | os.PathLike):
        raise ConfigError(
            f"The folder of the guard's state is {directory!r}; it must be a path, as text or as a Path. Give "
            "that of a checkpoint, 'run/checkpoint-100'."
        )
    return Path(directory) if rank == 0 else Path(directory) / f"interference_guard_rank{rank}"
