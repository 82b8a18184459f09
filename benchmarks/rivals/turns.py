"""Two runs that take their steps in turns, each timing its own."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class Turns(TrainerCallback):
    """One side of a pair; a run's time is that between its turns' beginnings and ends.

    Logs and what callbacks do after a step belong to the turn. Making a trainer does not.

    Args:
        mine: A semaphore that lets this side go on.
        other: The one of the other side.
        alone: An event, set once a side has ended.
        limit: Most seconds to wait for a turn.
    """

    def __init__(self, mine: Any, other: Any, alone: Any, limit: float) -> None:
        self.mine, self.other, self.alone, self.limit = mine, other, alone, limit
        self.seconds = 0.0
        self._began: float | None = None

    @classmethod
    def pair(cls, context: Any, limit: float) -> tuple[Turns, Turns]:
        """Both sides; the first one begins."""
        first, second, alone = context.Semaphore(1), context.Semaphore(0), context.Event()
        return cls(first, second, alone, limit), cls(second, first, alone, limit)

    def join(self, method: Any) -> None:
        """Be a callback of every trainer that a method is attached to."""
        attach = method.attach

        def attached(trainer: Any, result: Any) -> None:
            attach(trainer, result)
            trainer.add_callback(self)

        method.attach = attached

    def leave(self) -> None:
        """This side has ended: the other one waits no more."""
        self._pass()
        self.alone.set()
        self.other.release()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the turn, and wait for it to come back."""
        self._pass()
        if not self.alone.is_set() and not self.mine.acquire(timeout=self.limit):
            raise TimeoutError(f"No turn came within {self.limit:.0f} seconds: the other run has stopped.")
        self._began = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A trainer has ended; another one of the same run may follow."""
        self._pass()

    def _pass(self) -> None:
        if self._began is not None:
            self.seconds += time.perf_counter() - self._began
            self._began = None
            self.other.release()
