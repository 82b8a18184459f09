"""Every method that is compared, and what it is tuned over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..bed.run import Run


@dataclass(frozen=True)
class Rival:
    """One method.

    Args:
        about: What it does, in a few words.
        make: Its name in its module: ``"module:Class"``, so that a table needs no trainer.
        strengths: What it is tuned over beside the rate.
        settings: The guard's settings at a strength.
        rehearses: Whether it trains rows of earlier domains.
    """

    about: str
    make: str
    strengths: tuple[Any, ...] = (None,)
    settings: Callable[[Any], Mapping[str, Any]] = lambda strength: {}
    rehearses: bool = False

    @property
    def ordered(self) -> list[float]:
        """The strengths that are numbers, where there are several: their ends are edges of the search."""
        numbers = [value for value in self.strengths if isinstance(value, int | float)]
        return numbers if len(numbers) > 1 else []

    def method(self) -> Callable[[Run], Any]:
        """The class, imported now."""
        from importlib import import_module

        module, _, name = self.make.partition(":")
        found: Callable[[Run], Any] = getattr(import_module(f"benchmarks.{module}"), name)
        return found


GUARD = "bed.method:Guarded"


def _alone(budget: float) -> dict[str, Any]:
    return {
        "project": False,
        "recovery": True,
        "recovery_budget": budget,
        "recovery_tolerance": 0.6 * budget,
        "probe_steps": 10,
    }


def _both(budget: float) -> dict[str, Any]:
    return {"budget": budget, "recovery": True, "recovery_budget": 0.05, "recovery_tolerance": 0.02}


RIVALS: dict[str, Rival] = {
    "plain": Rival("one domain after the other", "bed.method:Method"),
    "plain, a trainer each": Rival("the same with a new optimizer for each domain", "rivals.separate:Separate"),
    "guard": Rival(
        "projection, by its budget", GUARD, (0.01, 0.02, 0.05, 0.1), lambda budget: {"budget": budget}
    ),
    "guard, recovery alone": Rival("recovery phases, by their budget", GUARD, (0.05, 0.1), _alone, True),
    "guard, both": Rival("a projection by its budget, and recovery", GUARD, (0.05, 0.1), _both, True),
    "guard, replay": Rival(
        "a projection beside a share of rows of earlier domains",
        "rivals.replay:GuardedReplay",
        (0.25, 0.4),
        # No earlier domain alone has half of a batch: all of them stay protected while they are replayed.
        lambda share: {"active_share": 0.5},
        rehearses=True,
    ),
    "mixed": Rival(
        "rows of all domains, or a domain a step", "bed.method:Mixed", ("rows", "batches"), rehearses=True
    ),
    "replay": Rival("a share of rows of earlier domains", "rivals.replay:Replay", (0.25, 0.5), rehearses=True),
    "KL": Rival("beta against the phase's start", "rivals.kl:PhaseKL", (0.01, 0.1, 1.0)),
    "EWC": Rival("a penalty by each domain's Fisher", "rivals.ewc:EWC", (0.1, 1.0, 10.0)),
    "A-GEM": Rival("gradients turned, by remembered rollouts", "rivals.agem:AGEM", (64, 256)),
    "OSF": Rival("PEFT's, by its frozen share", "rivals.osf:OSF", ("progressive", 0.25, 0.5)),
    "OSFT-like": Rival(
        "steps kept out of leading directions",
        "rivals.subspaces:OSFTLike",
        ("both progressive", "both 0.5", "right 0.5", "right 0.75"),
    ),
    "random subspace": Rival("steps in random directions", "rivals.subspaces:RandomSubspace", (0.1, 0.25, 0.5)),
}
