"""The guard's state beside the engine's checkpoints, saved and read by all ranks together."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from interference_guard import checkpoint
from interference_guard.errors import GuardError, StateError
from interference_guard.guard import Guard
from interference_guard.handover import compare, compare_regions
from interference_guard.written import Written, withdraw

from .settings import RunSettings

FORMER = (
    "Set actor_rollout_ref.model.path to the weights of the checkpoint that +guard.state names: its folder "
    "huggingface, if it was saved with actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,"
    "hf_model]. verl.model_merger rounds to bf16."
)
RESUMED = (
    "Resume from another checkpoint (trainer.resume_mode=resume_path trainer.resume_from_path=...), with model "
    "among actor_rollout_ref.actor.checkpoint.load_contents, or train on without the guard: +guard.enabled=false."
)


class Checkpoints:
    """Saves and reads the guard's state; whatever one rank meets, all of them raise.

    Args:
        guard: Its state is saved.
        place: This rank and their number, among those with rows of their own.
        say: Writes a line to the console.
        former: This rank's folder of the state that the run begins with, where no checkpoint of its own is read
            before its first step.
    """

    def __init__(
        self, guard: Guard, place: tuple[int, int], say: Callable[[str], None], former: Path | None = None
    ) -> None:
        self.guard, self.place, self._say, self._former = guard, place, say, former
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._failed: GuardError | None = None

    def look(self, settings: RunSettings) -> None:
        """Look at the state that the run begins with, before anything is generated or trained.

        Not where a checkpoint may be read before the first step, which brings a state of its own.

        Raises:
            StateError: If it cannot be read.
        """
        if self._former is not None and not any(self._gather(_resumes(settings))):
            self._together(checkpoint.look_own, self._former)

    def begin(self) -> bool:
        """Take over the state of a former run before the first step, and report what could not be saved.

        Returns:
            Whether a state was taken over.

        Raises:
            StateError: If a state cannot be read, or could not be written with the last checkpoint.
        """
        error, self._failed = self._failed, None
        if error is not None:
            raise error
        former = self._former
        if former is None:
            return False
        self.load(former)
        where = f"saved beside {former}"
        if not compare(checkpoint.weights_beside(former), self.guard.view, where, FORMER):
            compare_regions(self.guard, where, FORMER)
        self._former = None
        return True

    def save(self, folder: Path) -> bool:
        """Write this rank's state before the engine writes, and put it in place if all ranks' can be.

        First, since the engine deletes former checkpoints when it has written. An earlier state in the folder
        goes before: it is of an attempt whose weights are about to be replaced. If the process is killed until
        they are, resuming finds a state of other weights, see `resume`. What cannot be written is said, and an
        error of all ranks' next step: the trainer's own checkpoint, of which the engine's is a part, is complete
        only after this.

        Returns:
            Whether all ranks' states are in place.
        """
        save_id = self._gather(uuid.uuid4().hex)[0]
        written: Written | None = None
        failed: GuardError | None = None
        try:
            withdraw(folder)
            written = checkpoint.write(self.guard, folder, self.world, self.place, save_id)
        except GuardError as error:
            failed = error
        if not self._all_saved(failed):
            if written is not None:
                written.drop()
            return False
        try:
            if written is not None:
                written.publish()
        except GuardError as error:
            failed = error
        return self._all_saved(failed)

    def load(self, folder: Path) -> None:
        """Read this rank's state, or what belongs to it of the states of another number of ranks.

        Raises:
            StateError: If any rank's is missing, damaged or of another model, or they are of different moments.
        """
        ready = self._together(checkpoint.read_own, folder)
        moments = self._gather((int(ready.details["steps"]), ready.save_id))
        if len(set(moments)) > 1:
            raise StateError(
                f"The ranks read states of different moments from {folder} and its like: they are at steps "
                f"{[steps for steps, _ in moments]}, of {len({save for _, save in moments})} attempts. Put the "
                "files of every rank of one checkpoint there."
            )
        ready.take()
        # A run that had trained nothing yet, as veRL's critic_warmup lets it, still has to begin with it.
        if self.guard.steps or self.guard.domains:
            self._former = None

    def resume(self, folder: Path) -> None:
        """Read the state beside weights that the engine has just read.

        Raises:
            StateError: As `load`, and if the state is of another attempt than the weights.
        """
        self.load(folder)
        self._raised(partial(checkpoint.check_weights, self.guard, folder, RESUMED))

    def _together(self, read: Callable[..., Any], folder: Path) -> Any:
        """Read the states of all ranks, whose folders are called alike."""
        stem = folder.name.rstrip("0123456789")

        def folder_of(rank: int) -> Path:
            return folder.with_name(f"{stem}{rank}")

        return self._raised(partial(read, self.guard, folder_of, self.rank, self.world, self.place))

    def _raised(self, call: Callable[[], Any]) -> Any:
        """What a call returns; its error on any rank is one of all ranks, none of which may go on alone."""
        found, error = None, None
        try:
            found = call()
        except GuardError as raised:
            error = raised
        messages = self._messages(error)
        if messages:
            raise error or StateError(messages[0])
        return found

    def _all_saved(self, failed: GuardError | None) -> bool:
        messages = self._messages(failed)
        if messages:
            self._failed = failed or StateError(messages[0])
            self._say(
                f"A checkpoint is without the guard's state on {len(messages)} of {self.world} ranks, so a "
                f"guarded run cannot resume from it: {messages[0]} Former checkpoints are kept, and the next "
                "step is an error."
            )
        return not messages

    def _messages(self, error: GuardError | None) -> list[str]:
        """What went wrong on any rank."""
        found = self._gather(None if error is None else str(error))
        return [message for message in found if message is not None]

    def _gather(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found


def _resumes(settings: RunSettings) -> bool:
    """Whether the trainer may read a checkpoint before the first step."""
    if settings.resume_mode == "auto" and settings.folder is not None:
        return find_latest_ckpt_path(settings.folder) is not None
    return settings.resume_mode != "disable"
