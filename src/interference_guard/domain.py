"""All the guard keeps about one domain."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .curvature import DomainCurvature
from .first_order import GradientMean
from .local_model import LocalModel
from .means import RunningMean
from .probe import Completions, Measurement, join
from .protected import ProtectedSet
from .trust_region import TrustRegion

# The reward at the anchor averages this many latest batches: one is too noisy, more would include an older
# policy.
RECENT = 4
# The probe is made of the rows of this many latest steps, or of more where these have too few rows.
POOL = 4
# Rewards after which a domain's range counts as known, and how many times as wide a range is then reported.
SETTLED, OUTLYING = 128, 3.0


# Fields that are running means, which are saved by their sums.
MEANS = ("rollouts", "rewards", "lengths")


@dataclass
class DomainState:
    """State of one domain; the guard owns it, hosts only read it.

    Args:
        name: The domain.
        curvature: Its running sums.
        region: Its trust region.
        model: Its local model, None before the first anchor.
        anchored: Whether `model` stands at the weights after the domain's latest own step.
        own_steps: Own steps since the last anchor.
        since_refresh: Own steps since the directions were computed.
        mixed_steps: Steps in a row that trained it together with others, while it kept its anchor.
        foreign_steps: Steps of other domains since the anchor.
        renewed_at: The foreign steps at which the region was last moved; 0 where it stands at the anchor.
        renewals: How often that was, since the first anchor.
        pending: Retained rows by step, newest last.
        kept_at: The guard's steps at the latest of them; -1 where there are none.
        retained: The completions the probe is made of.
        measurable: Whether any rank retained completions for a probe.
        temperature: Of their sampling; the same on all ranks.
        anchor_scores: Their token log-probabilities at the last scored anchor, ``(rows, length)`` fp32.
        low, high: Reward range shown so far; NaN before the first reward.
        rewarded: Rollouts whose reward is in the range.
        anchor_reward: Mean reward at the anchor: the host's own evaluation if it made one, else the
            retained rows'.
        evaluated: Whether `anchor_reward` is an evaluation.
        recent: Sum and number of the rewards of the latest batches of own rollouts, newest last.
        target_reward: Mean reward of those when the domain's own training ended, which a recovery must reach; NaN
            without rewards.
        retained_reward: Mean reward of the retained rows at the anchor, or of the batches in `recent` where rows
            without a token to score were left out; NaN without rewards.
        rollouts: Rewards of the recovery step now made.
        fresh: Whether the probe is of the present anchor, and not of one a few own steps before it.
        interrupted: Whether this anchor stands inside the domain's own training, for another's recovery.
        scored_at: The guard's steps when `anchor_scores` were last made for an anchor; None before.
        reference: Whether the domain is only known from given data, and no rows of it are trained.
        true_reward: The host's latest evaluation since the anchor, NaN without one.
        measurement: The last probe.
        gradient: Mean gradient of the latest own steps, None unless `first_order` is set.
        start: The weights where its own training began, seen through random directions, per block ``(matrices,
            units, residual)`` fp32; None unless units are selected by edits, and outside of its training.
        slopes: The same along the local model's directions at the anchor, per block ``(rows, rank)``.
        radius: The region's radius as a 0-d tensor on the device; infinite until the first
            step that visibly moves the weights.
        subspace: Raw prediction inside the domain's directions after the last step, a 0-d tensor.
        energy: Squared length of the gradients of the latest step that trained it alone, over all ranks, a 0-d
            tensor; None before the first.
        moved: Squared length of all that projections for this domain took from each matrix, summed over the
            steps, ``(matrices of all blocks,)`` fp32; None before the first.
        protected_set: Units that its protection covers, None before the first anchor.
        half_set: Units that carry half of its curvature energy, None before the first anchor.
        rewards: Rewards of its own rollouts since the last report.
        lengths: Completion lengths of those, in tokens.
    """

    name: str
    curvature: DomainCurvature
    region: TrustRegion
    model: LocalModel | None = None
    anchored: bool = False
    own_steps: int = 0
    since_refresh: int = 0
    mixed_steps: int = 0
    foreign_steps: int = 0
    renewed_at: int = 0
    renewals: int = 0
    pending: list[Completions] = field(default_factory=list)
    kept_at: int = -1
    retained: Completions | None = None
    measurable: bool = False
    temperature: float = 1.0
    anchor_scores: Tensor | None = None
    low: float = math.nan
    high: float = math.nan
    rewarded: int = 0
    anchor_reward: float = math.nan
    evaluated: bool = False
    recent: list[list[float]] = field(default_factory=list)
    target_reward: float = math.nan
    retained_reward: float = math.nan
    rollouts: RunningMean = field(default_factory=RunningMean)
    fresh: bool = True
    interrupted: bool = False
    scored_at: int | None = None
    reference: bool = False
    true_reward: float = math.nan
    measurement: Measurement | None = None
    gradient: GradientMean | None = None
    slopes: list[Tensor] | None = None
    radius: Tensor | None = None
    subspace: Tensor | None = None
    energy: Tensor | None = None
    moved: Tensor | None = None
    protected_set: ProtectedSet | None = None
    half_set: ProtectedSet | None = None
    start: list[Tensor] | None = None
    rewards: RunningMean = field(default_factory=RunningMean)
    lengths: RunningMean = field(default_factory=RunningMean)

    @property
    def device(self) -> torch.device | None:
        """Where its sums lie, None before the first."""
        return self.curvature.sums[0].energy.device if self.curvature.sums else None

    @property
    def span(self) -> tuple[float, float] | None:
        """Lowest and highest reward, or None while fewer than two different ones were seen."""
        return (self.low, self.high) if self.high > self.low else None

    # The region's radius is a plain number, known once it was read; the projection reads a tensor, which the
    # first step sets without waiting for the device. The two are brought together here alone.

    def update_radius(self, rate: float) -> None:
        """Follow a foreign step, which left `subspace`; the device is not read.

        The radius grows with the learning rate, and begins at the length of the first step that visibly moves.

        Args:
            rate: Learning rate of the step; NaN where it is not known.
        """
        assert self.subspace is not None
        # The first visible displacement: nothing else is known of the unit yet. A step at rate 0 (the
        # start of a warm-up) shows rounding alone, and a radius of that size would freeze learning.
        if self.radius is None:
            self.radius = torch.full_like(self.subspace, math.inf)
        if (factor := self.region.grow_with_rate(rate)) != 1:
            self.radius = self.radius * factor
        if not self.region.radius and self.model is not None:
            visible = (self.subspace > 4 * self.model.rounding()) & self.radius.isinf()
            self.radius = torch.where(visible, self.subspace, self.radius)

    def settle_radius(self) -> None:
        """Let the region know the radius that a first visible step has set; reads the device."""
        if self.radius is not None and not self.region.radius and math.isfinite(first := self.radius.item()):
            self.region.radius = self.region.largest = first

    def follow_region(self) -> None:
        """Put the region's radius, once it has one, where the projection reads it."""
        if self.radius is not None and self.region.radius:
            self.radius.fill_(self.region.radius)

    def move_region(self, turned: bool, loss: float | None = None) -> None:
        """Put the region's centre where the weights are, see `TrustRegion.move`; its radius begins anew."""
        self.region.move(turned, loss)
        self.radius = self.subspace = None
        self.renewed_at = self.foreign_steps

    def tighten_region(self, subspace: float) -> None:
        """Hold the domain closer, see `TrustRegion.tighten`."""
        self.region.tighten(subspace)
        self.follow_region()

    def see_rewards(self, lowest: float, highest: float) -> None:
        """Widen the reward range."""
        self.low = lowest if math.isnan(self.low) else min(self.low, lowest)
        self.high = highest if math.isnan(self.high) else max(self.high, highest)

    def outlies(self, lowest: float, highest: float) -> bool:
        """Whether new rewards would make a range that many rollouts have shown several times as wide."""
        if self.span is None or self.rewarded < SETTLED:
            return False
        low, high = self.span
        return max(high, highest) - min(low, lowest) > OUTLYING * (high - low)

    def note_rewards(self, total: float, count: int) -> None:
        """Add the rewards of a batch of own rollouts."""
        self.rewarded += count
        self.rewards.add(total, count)
        self.rollouts.add(total, count)
        self.recent = [*self.recent[1 - RECENT :], [total, float(count)]]

    def keep(self, completions: Completions, limit: int, step: int) -> None:
        """Keep copies of rows for the next anchor, of which `latest` will choose at most `limit`.

        Args:
            completions: The rows.
            limit: Most of them that a probe is made of.
            step: The guard's steps so far: rows of one step belong together.
        """
        rows = completions.evenly(limit).detached()
        if self.kept_at == step and self.pending:
            # Of one step, whose batch comes in parts.
            rows = join([self.pending[-1], rows]).evenly(limit)
            self.pending.pop()
        self.pending.append(rows)
        self.kept_at = step
        # Where steps are small it takes more of them, and none that are not needed: the policy was another one.
        while len(self.pending) > POOL and self._suffice(self.pending[1:], limit):
            self.pending.pop(0)

    def _suffice(self, parts: list[Completions], limit: int) -> bool:
        """Whether `limit` of these rows have a token to score, or they are as many as large steps leave."""
        count = sum(map(len, parts))
        if not limit <= count < POOL * limit:
            return count >= limit
        return sum(part.scorable_rows for part in parts) >= limit

    def discard(self, step: int) -> None:
        """Let go of the rows of a step that proved to be none of the domain's own."""
        if self.kept_at == step and self.pending:
            self.pending.pop()
            self.kept_at = -1

    def latest(self, limit: int) -> Completions | None:
        """At most `limit` retained rows, spread over the latest steps; earlier ones of the probe fill up.

        Rows without a token to score are left out where there are others.
        """
        rows = join(self.pending).preferred().evenly(limit) if self.pending else None
        if self.retained is None or (rows is not None and len(rows) >= limit):
            return rows
        return self.retained if rows is None else join([self.retained.evenly(limit - len(rows)), rows])

    def unscorable(self) -> int:
        """How many of the rows that wait for the next anchor have no token to score; reads the device."""
        return sum(len(part) - part.scorable_rows for part in self.pending)

    def forget_pending(self) -> None:
        """Begin a new list of retained rows."""
        self.pending, self.kept_at = [], -1
