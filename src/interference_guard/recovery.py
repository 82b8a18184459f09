"""When a domain gets a few steps of its own back: explicit states and pure transitions between them.

    idle --(interference past the recovery budget)--> recovering --(phase over)--> cooling --> idle

A phase ends when the domain's reward is back, after `recovery_steps`, or where one more step would pass the cap
on the share of all steps. Two thresholds lie apart, as in any hysteresis: a phase starts at the recovery budget
and ends at the tolerance. After a phase nothing starts for `recovery_cooldown` steps, and a domain that was not
brought back waits twice as long, so that noise at the threshold cannot start phase after phase. Each failure in a
row also halves the claim of a domain against the others: one that cannot be brought back must not take the whole
share of steps from those that can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from .config import GuardConfig

Phase = Literal["idle", "recovering", "cooling"]
# Times that a host may go on training other domains before a phase is given up.
PATIENCE = 20
# Cool-downs that a domain waits after a phase that did not bring it back.
WAIT = 2


@dataclass(frozen=True)
class RecoveryLimits:
    """The settings a schedule needs, as plain numbers.

    Args:
        steps: Most own steps of one phase.
        cooldown: Steps after a phase in which none starts.
        share: Most recovery steps as a part of all steps, at any time.
    """

    steps: int
    cooldown: int
    share: float

    @classmethod
    def of(cls, config: GuardConfig, unit: int = 1) -> RecoveryLimits:
        """The limits in a guard's settings, where a host can change its domain after every `unit` steps."""
        steps = -(-config.recovery_steps // unit) * unit
        return cls(steps, config.recovery_cooldown, config.recovery_share)


@dataclass(frozen=True)
class RecoverySchedule:
    """State of the schedule; every method returns a new one.

    Args:
        phase: Where it is.
        domain: The domain that recovers, None unless `phase` is ``"recovering"``.
        taken: Steps of the present phase; of the last one when none runs.
        judged: Steps of the present phase that brought rollouts of its own.
        idle: How often other domains were trained since the phase started.
        regained: Whether the last phase brought its domain back.
        total: Recovery steps so far.
        phases: Phases so far.
        failures: Phases so far that did not bring their domain back.
        rest: Steps until the cool-down ends.
        waits: Domains that must wait, by the number of all steps at which they may recover again.
        failed: Phases in a row that did not bring a domain back, by domain.
        expected: Steps that the present or last phase was expected to need, NaN where unknown.
        displaced: Quadratic prediction at the start of that phase.
        loss: Measured loss there.
    """

    phase: Phase = "idle"
    domain: str | None = None
    taken: int = 0
    judged: int = 0
    idle: int = 0
    regained: bool = False
    total: int = 0
    phases: int = 0
    failures: int = 0
    rest: int = 0
    waits: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    expected: float = math.nan
    displaced: float = math.nan
    loss: float = math.nan

    def start(self, excess: Mapping[str, float], steps: int, limits: RecoveryLimits) -> RecoverySchedule:
        """Start a phase for the worst domain, if one may start; each failure in a row halves its excess.

        Args:
            excess: Each candidate's interference over its recovery budget; from 1 on it needs recovery.
            steps: Optimizer steps so far.
            limits: Settings.

        Returns:
            The schedule with the phase started, or itself.
        """
        ready = {name: value for name, value in excess.items() if value >= 1 and self.may(name, steps, limits)}
        if not ready:
            return self
        worst = max(sorted(ready), key=lambda name: ready[name] / 2 ** self.failed.get(name, 0))
        return replace(
            self,
            phase="recovering",
            domain=worst,
            taken=0,
            judged=0,
            idle=0,
            regained=False,
            phases=self.phases + 1,
            expected=math.nan,
        )

    def may(self, domain: str, steps: int, limits: RecoveryLimits) -> bool:
        """Whether a phase of this domain could start now."""
        # The whole phase must fit under the cap, so that it is not cut short for lack of steps.
        room = self.total + limits.steps <= limits.share * (steps + limits.steps)
        return self.phase == "idle" and room and self.waits.get(domain, 0) <= steps

    def passed_over(self, steps: int, limits: RecoveryLimits) -> RecoverySchedule:
        """Other domains were trained although a phase runs; after `PATIENCE` times it is given up."""
        now = replace(self, idle=self.idle + 1)
        return now if now.idle < PATIENCE else now.abandon(steps, limits)

    def abandon(self, steps: int, limits: RecoveryLimits) -> RecoverySchedule:
        """Give up the present phase, as one that did not bring its domain back."""
        if self.phase != "recovering":
            return self
        # The domain had no chance: that takes nothing from its claim.
        return replace(self._end(False, steps, limits), failed=self.failed)

    def trained(self, domain: str) -> RecoverySchedule:
        """The domain is trained by plan: what failed before says nothing of where it will stand."""
        if domain not in self.failed:
            return self
        return replace(self, failed={name: count for name, count in self.failed.items() if name != domain})

    def step(self, regained: bool, steps: int, limits: RecoveryLimits, took: int = 1) -> RecoverySchedule:
        """Count optimizer steps.

        Args:
            regained: Whether the recovering domain's reward is back; without a phase it means nothing.
            steps: Optimizer steps so far, these included.
            limits: Settings.
            took: How many steps.

        Returns:
            The schedule after them.
        """
        if self.phase == "cooling":
            return replace(self, rest=max(self.rest - took, 0), phase="cooling" if self.rest > took else "idle")
        if self.phase == "idle":
            return self
        now = replace(self, taken=self.taken + took, total=self.total + took)
        full = now.taken >= limits.steps or now.total + took > limits.share * (steps + took)
        return now._end(regained, steps, limits) if regained or full else now

    def _end(self, regained: bool, steps: int, limits: RecoveryLimits) -> RecoverySchedule:
        assert self.domain is not None
        waits = {name: until for name, until in self.waits.items() if until > steps and name != self.domain}
        failed = {name: count for name, count in self.failed.items() if name != self.domain}
        if not regained:
            waits[self.domain] = steps + WAIT * limits.cooldown
            failed[self.domain] = self.failed.get(self.domain, 0) + 1
        return replace(
            self,
            phase="cooling" if limits.cooldown else "idle",
            domain=None,
            regained=regained,
            failures=self.failures + (not regained),
            rest=limits.cooldown,
            waits=waits,
            failed=failed,
        )

    def state(self) -> dict[str, Any]:
        """Everything as plain numbers and words, for JSON."""
        return asdict(self)


def expected_steps(before: float, after: float, loss: float, tolerance: float) -> float:
    """Steps a phase needs, from the contraction of its first one.

    A refresh contracts the harmful displacement by (1 - alpha mu) a step, so a quadratic loss by its square.
    alpha mu is not known under an adaptive optimizer; it is read off the first step's quadratic prediction.

    Args:
        before: Quadratic prediction before the first own step.
        after: The same after it.
        loss: Loss at the start of the phase.
        tolerance: Loss at which it ends.

    Returns:
        The number of steps, at least 1; infinite where the first step did not contract, NaN where nothing was
        displaced.

    Reference:
        Yang et al., 2026, arXiv:2606.02398, theorem 1.

    >>> expected_steps(1.0, 0.5, 0.08, 0.01)
    3.0
    """
    if not (before > 0 and math.isfinite(before) and math.isfinite(after) and loss > 0 and tolerance > 0):
        return math.nan
    if loss <= tolerance:
        return 1.0
    if after >= before:
        return math.inf
    if after <= 0:
        return 1.0
    return max(1.0, math.log(tolerance / loss) / math.log(after / before))
