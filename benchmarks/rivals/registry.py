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
        strengths: What it is tuned over beside the rate; the rate is tuned at the first.
        settings: The guard's settings at a strength.
    """

    about: str
    make: str
    strengths: tuple[Any, ...] = (None,)
    settings: Callable[[Any], Mapping[str, Any]] = lambda strength: {}

    def method(self) -> Callable[[Run], Any]:
        """The class, imported now."""
        from importlib import import_module

        module, _, name = self.make.partition(":")
        found: Callable[[Run], Any] = getattr(import_module(f"benchmarks.{module}"), name)
        return found


BUDGETS = (0.02, 0.01, 0.05, 0.1)
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
    "guard": Rival("projection, by its budget", GUARD, BUDGETS, lambda budget: {"budget": budget}),
    "guard, recovery alone": Rival("recovery phases, by their budget", GUARD, (0.05, 0.02, 0.1), _alone),
    "guard, both": Rival("a projection by its budget, and recovery", GUARD, (0.1, 0.05, 0.2), _both),
    "mixed": Rival("rows of all domains, or a domain a step", "bed.method:Mixed", ("rows", "batches")),
    "replay": Rival("a share of rows of earlier domains", "rivals.replay:Replay", (0.25, 0.5)),
    "KL": Rival("beta against the phase's start", "rivals.kl:PhaseKL", (0.03, 0.01, 0.1, 0.3)),
    "EWC": Rival("a penalty by each domain's Fisher", "rivals.ewc:EWC", (10.0, 1.0, 100.0, 1000.0)),
    "A-GEM": Rival("gradients turned, by remembered rollouts", "rivals.agem:AGEM", (64, 128)),
    "OSF": Rival("PEFT's, by its frozen share", "rivals.osf:OSF", (0.5, 0.25, 0.75)),
    "OSFT-like": Rival(
        "steps kept out of leading directions",
        "rivals.subspaces:OSFTLike",
        ("right 0.5", "right 0.25", "right 0.75", "left 0.5", "both 0.5"),
    ),
    "random subspace": Rival("steps in random directions", "rivals.subspaces:RandomSubspace", (0.25, 0.1, 0.5)),
}
