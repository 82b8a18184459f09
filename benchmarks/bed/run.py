"""What one run of a bed is, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Watch = Callable[[str, int, dict[str, float]], None]


@dataclass(frozen=True)
class Run:
    """What is run.

    Args:
        method: ``"plain"``, ``"guarded"``, ``"observed"`` (the guard predicts and measures only),
            ``"mixed"`` (all domains in every batch, the same number of rollouts), or the name of a rival.
        rate: Learning rate of AdamW.
        seed: Of weights, data and sampling.
        order: Domains in the order they are trained.
        steps: Optimizer steps of each domain.
        guard: Settings of the guard that differ from the defaults.
        bed: Name of the bed.
        strength: What the method is tuned by beside the rate, in its own unit.
        tests: Rows of each domain that the policy is tested on.
        reference: A domain that the warm start teaches without noise and that is never trained afterwards; with
            `"guarded"` it is protected as a reference domain.
    """

    method: str
    rate: float
    seed: int
    order: tuple[str, ...]
    steps: int = 60
    guard: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    bed: str = "gym"
    strength: Any = None
    tests: int = 256

    @property
    def names(self) -> tuple[str, ...]:
        """All domains that are tested."""
        return self.order if self.reference is None else (*self.order, self.reference)


@dataclass
class Result:
    """What came out; pass rates are sampled, on rows of the bed's own for tests.

    Args:
        run: The run.
        curve: Per evaluation: step, and each domain's pass rate.
        own: Pass rate right after the domain's own phase.
        final: Pass rate at the end.
        start: Pass rate of the warm start.
        seconds: Wall-clock time of training without evaluations.
        guard_seconds: Time of the guard by part.
        phases: Per phase: its seconds without evaluations, and the guard's by part.
        metrics: The guard's metrics by step.
        pairs: With `"observed"`: step, domain, both parts of the raw prediction, their coefficients so far,
            measured loss and KL.
        method_seconds: Time that the method itself took of `seconds`, where it keeps a clock.
        method_bytes: What it keeps at the end, beside what plain training has.
        recoveries: Per recovery phase: the step it ended at, its domain, the steps it took, those it was expected
            to take after its first, and whether the reward came back.
    """

    run: dict[str, Any]
    curve: list[dict[str, float]] = field(default_factory=list)
    own: dict[str, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    guard_seconds: dict[str, float] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    method_seconds: float = 0.0
    method_bytes: int = 0

    @property
    def average(self) -> float:
        """Mean final pass rate."""
        return sum(self.final.values()) / len(self.final)

    @property
    def forgetting(self) -> float:
        """Mean of own minus final over all domains but the last, which nothing follows."""
        earlier = list(self.own)[:-1]
        return sum(self.own[name] - self.final[name] for name in earlier) / max(len(earlier), 1)

    @property
    def bwt(self) -> float:
        """Backward transfer (Lopez-Paz and Ranzato, 2017): the mean change after the own phase."""
        return -self.forgetting
