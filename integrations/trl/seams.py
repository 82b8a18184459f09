"""Methods of one trainer instance, wrapped and put back: the class and other trainers stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import Trainer

from interference_guard.errors import HostError

# Attributes of one instance; the class behind it is never changed.
ALWAYS = (
    "log",
    "evaluate",
    "_prepare_inputs",
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
    "_load_best_model",
    "_set_signature_columns_if_needed",
)
GENERATING = ("_generate_and_score_completions", "_calculate_rewards")
# Needed only by recovery phases.
RECOVERING = ("get_batch_samples", "_remove_unused_columns")
TESTED = ("GRPOTrainer", "RLOOTrainer", "SFTTrainer")


def generates(trainer: Any) -> bool:
    """Whether a trainer makes its completions itself, as far as the guard can tell."""
    return any(hasattr(trainer, name) for name in GENERATING)


class Seams:
    """Wraps methods of a trainer instance; `restore` leaves nothing behind.

    Args:
        trainer: The trainer.
        recovery: Whether recovery phases are wanted.

    Raises:
        HostError: If it is no trainer, or lacks a method the guard needs; nothing is wrapped then.
    """

    def __init__(self, trainer: Any, recovery: bool = False) -> None:
        if not isinstance(trainer, Trainer):
            raise HostError(
                f"A {type(trainer).__name__} was given to guard. Give the trainer first: "
                "InterferenceGuardCallback(trainer, config)."
            )
        self.trainer = trainer
        self.generates = generates(trainer)
        needed = ALWAYS + (GENERATING if self.generates else ()) + (RECOVERING if recovery else ())
        absent = [name for name in needed if not callable(getattr(trainer, name, None))]
        if recovery and self.generates and not hasattr(trainer, "_buffered_inputs"):
            absent.append("_buffered_inputs")
        if absent:
            kind = type(trainer).__name__
            if any(base.__name__ in TESTED for base in type(trainer).__mro__):
                raise HostError(
                    f"{kind} has no {absent[0]!r}, which the guard needs. Tested are GRPOTrainer, RLOOTrainer "
                    "and SFTTrainer of trl 1.14 to 1.16; install one of these versions."
                )
            raise HostError(
                f"{kind} is not supported: it has no {absent[0]!r}, by which the guard follows the rows of "
                "such a trainer. Guard a GRPOTrainer, RLOOTrainer or SFTTrainer, or train without the guard."
            )
        self._wrapped: dict[str, tuple[bool, Any, Any]] = {}
        self._afterwards: list[Callable[[], None]] = []
        self._active = True

    def wrap(self, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace the method `name` of this instance by ``make(method)``, until `restore`."""
        before = getattr(self.trainer, name)
        own = name in vars(self.trainer)
        after = made = make(before)
        # An object in its place must stay one that can be pickled: data loaders may hand it to other processes.
        if hasattr(made, "__name__"):

            @wraps(before)
            def after(*args: Any, **kwargs: Any) -> Any:
                # Someone may have wrapped it since and keep calling it.
                return (made if self._active else before)(*args, **kwargs)

        setattr(self.trainer, name, after)
        self._wrapped[name] = (own, before, after)

    def afterwards(self, call: Callable[[], None]) -> None:
        """Have `restore` call this at its end."""
        self._afterwards.append(call)

    def restore(self) -> None:
        """Put every method back as it was; where someone wrapped one since, ours does nothing any more."""
        self._active = False
        for name, (own, before, after) in self._wrapped.items():
            if vars(self.trainer).get(name) is not after:
                continue
            if own:
                setattr(self.trainer, name, before)
            else:
                delattr(self.trainer, name)
        self._wrapped.clear()
        while self._afterwards:
            self._afterwards.pop()()
