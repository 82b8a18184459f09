"""Radius control and calibration: the raw prediction's unit, learned from measurements."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

from .probe import Measurement, Ratio

# Largest change of the radius at one measurement, from where the loss was measured.
GROW, SHRINK = 2.0, 0.5
# The projection is at its surface from this part of the radius on.
SURFACE = 0.9
# Weight an older (raw, loss) pair keeps when a new one arrives.
MEMORY = 0.7
# Where the part outside the directions leads, the radius stops at this part of its largest value.
FLOOR = 1.0 / 16.0
# Smallest radius in any case, as a part of the largest: far below it, fp32 has no room left.
LEAST = 1e-9
# Part of the budget from which a loss outside of the directions counts.
RENEWED_FROM = 0.5
SCALE_LIMITS = (0.2, 5.0)


class Raw(NamedTuple):
    """Parts of an uncalibrated prediction.

    Args:
        inside: Quadratic term inside the domain's directions, which the projection bounds.
        outside: Quadratic term outside them, estimated through random directions.
        linear: First-order term; 0 unless `first_order` is set.
    """

    inside: float
    outside: float
    linear: float = 0.0

    @property
    def quadratic(self) -> float:
        """Both quadratic parts."""
        return self.inside + self.outside


@dataclass
class TrustRegion:
    """Radius of one protected domain, and what turns a raw prediction into reward.

    Args:
        budget: Allowed loss, as a part of the reward range.
        budget_nats: The same for measurements in nats per token.
        radius: Bound of the raw subspace term; 0 until the first foreign step has set it.
        largest: Largest radius so far that a measurement within the budget led to.
        ceiling: Radius above which it does not grow, since the domain needed a recovery there.
        centre_loss: Measured loss at the region's centre, where it was moved from the anchor; not corrected by
            the truth.
        astray: Whether the part outside of the directions led at the last measurement.
        rate: Largest learning rate of a step since the radius began; 0 where rates are not known.
        xy, xx: Running sums of raw x loss and raw^2 (quadratic parts), whose quotient is the calibration.
        ly, ll, lx: Running sums of linear x loss, linear^2 and linear x raw: with a first-order term the
            calibration is a least-squares fit of both.
        ratio: What the last measurement rests on, see `Measurement`; the sums are of such alone.
        truth_xy, truth_xx: By ratio, running sums of estimate x truth and estimate^2.
        loss: Last measured loss, or NaN.
        estimate: The same before correction by the truth.
    """

    budget: float
    budget_nats: float
    radius: float = 0.0
    largest: float = 0.0
    ceiling: float = math.inf
    centre_loss: float = 0.0
    astray: bool = False
    rate: float = 0.0
    xy: float = 0.0
    xx: float = 0.0
    ly: float = 0.0
    ll: float = 0.0
    lx: float = 0.0
    ratio: Ratio = "sequence"
    truth_xy: dict[str, float] = field(default_factory=dict)
    truth_xx: dict[str, float] = field(default_factory=dict)
    loss: float = math.nan
    estimate: float = math.nan

    @property
    def unit(self) -> Literal["reward", "nats"]:
        """Of the measurements."""
        return "nats" if self.ratio == "nats" else "reward"

    @property
    def allowed(self) -> float:
        """The budget in the unit of the measurements."""
        return self.budget_nats if self.unit == "nats" else self.budget

    @property
    def slope(self) -> float:
        """Loss per unit of the quadratic part taken alone, not negative; NaN before the first measurement."""
        return max(self.xy, 0.0) / self.xx if self.xx > 0 else math.nan

    @property
    def slopes(self) -> tuple[float, float]:
        """Loss per unit of the quadratic and of the linear part, neither negative.

        NaN and 0 before the first measurement; the second is 0 without a first-order term.
        """
        if self.xx <= 0:
            return math.nan, 0.0
        alone = self.slope
        determinant = self.xx * self.ll - self.lx**2
        # One pair, or two parallel ones, cannot tell the parts apart.
        if determinant <= 1e-6 * self.xx * self.ll:
            return alone, 0.0
        quadratic = (self.xy * self.ll - self.ly * self.lx) / determinant
        linear = (self.ly * self.xx - self.xy * self.lx) / determinant
        if linear <= 0:
            return alone, 0.0
        if quadratic <= 0:
            return 0.0, max(self.ly, 0.0) / self.ll
        return quadratic, linear

    @property
    def scale(self) -> float:
        """Correction of losses like the last one, see `correction`."""
        return self.correction(self.ratio)

    def correction(self, ratio: Ratio) -> float:
        """Correction of losses measured by such ratios by true ones: least squares through 0, shrunk toward 1.

        Ratios of whole sequences and those normalised by length see one loss very differently, so each kind has a
        correction of its own.
        """
        prior = self.budget**2
        value = (self.truth_xy.get(ratio, 0.0) + prior) / (self.truth_xx.get(ratio, 0.0) + prior)
        return min(max(value, SCALE_LIMITS[0]), SCALE_LIMITS[1])

    @property
    def spent(self) -> float:
        """Loss at the region's centre, in the unit of the measurements."""
        return self.centre_loss if self.unit == "nats" else self.centre_loss * self.scale

    def predict(self, raw: Raw, *, first_order: bool = True) -> float:
        """Calibrated prediction: expected loss at this raw value, NaN before the first measurement.

        Args:
            raw: The uncalibrated one.
            first_order: Whether it holds the first-order term. Without it the quadratic part is fitted alone.
        """
        quadratic, linear = self.slopes if first_order else (self.slope, 0.0)
        if self.xx <= 0 and self.centre_loss:
            # Just moved, with new directions: all that is known is the loss there.
            return self.spent
        return self.spent + quadratic * raw.quadratic + linear * raw.linear

    def measured(self, found: Measurement, raw: Raw, *, adapt: bool, noise: float) -> Measurement:
        """Take in a measurement: calibrate the prediction, then adapt the radius.

        Args:
            found: The uncorrected measurement.
            raw: The uncalibrated prediction under the same weights, after the projection.
            adapt: Whether the radius follows; without a projection there is nothing to control.
            noise: Raw predictions up to this value are rounding noise and are not used for calibration.

        Returns:
            The measurement corrected by the truth, with the prediction that was made for it.
        """
        x = raw.quadratic
        result = found.scaled(self.correction(found.ratio), x, self.predict(raw))
        if found.ratio != self.ratio:
            # Old pairs are in another unit, or of losses seen in another way.
            self._forget_pairs()
            before, self.ratio = self.unit, found.ratio
            if self.unit != before:
                # A reward range has appeared, or is gone.
                self.centre_loss = 0.0
        if not all(map(math.isfinite, (result.loss, x, raw.linear))):
            # One such number in the running sums would stay there for good.
            self.estimate, self.loss, self.astray = found.loss, result.loss, False
            return result
        # Normalised by raw so that one large displacement does not outweigh all others.
        weight = 1.0 / x if x > noise else 0.0
        gone = result.loss - self.spent
        self.xy = MEMORY * self.xy + weight * x * gone
        self.xx = MEMORY * self.xx + weight * x * x
        self.ly = MEMORY * self.ly + weight * raw.linear * gone
        self.ll = MEMORY * self.ll + weight * raw.linear**2
        self.lx = MEMORY * self.lx + weight * raw.linear * x
        self.estimate, self.loss = found.loss, result.loss
        self.astray = raw.outside > raw.inside
        if adapt:
            self._adapt(result.loss, raw.inside, raw.outside)
        return result

    def truth(self, loss: float) -> None:
        """Take in a true loss (in parts of the reward range) under the weights last measured."""
        if self.unit == "reward" and math.isfinite(self.estimate) and math.isfinite(loss):
            for sums, term in ((self.truth_xy, loss), (self.truth_xx, self.estimate)):
                sums[self.ratio] = MEMORY * sums.get(self.ratio, 0.0) + self.estimate * term

    def tighten(self, subspace: float) -> None:
        """The domain must recover: hold it closer from now on, until its own training resumes.

        A recovery takes steps from others, and what it brings back would be spent again at the same radius. Below
        the floor nothing is gained: what is lost then lies elsewhere, and others could no longer learn. Nor is it
        where the weights are outside already: then it was not the radius that let them go.

        Args:
            subspace: The subspace term of the weights that need the recovery.
        """
        if self.radius > 0 and SURFACE * subspace <= self.radius:
            self.radius = max(self.radius * SHRINK, min(self.radius, self.largest * FLOOR))
            self.ceiling = self.radius

    def grow_with_rate(self, rate: float) -> float:
        """Grow the radius where the learning rate has risen above that of the steps so far.

        The radius begins at the length of one step. In a warm-up the first steps are a small part of what
        follows, and growth by measurements would take far longer than the warm-up. Nothing grows where the last
        loss asks for less, nor beyond what the budget allows by the measurements so far.

        Args:
            rate: Of the coming step; NaN where it is not known.

        Returns:
            The factor by which it grows, 1 where it does not.
        """
        before = self.rate
        if not rate > before:
            return 1.0
        self.rate = rate
        if not before or self.loss > 0.5 * self.allowed:
            return 1.0
        factor = (rate / before) ** 2
        if self.radius > 0:
            factor = max(min(factor, self.ceiling / self.radius, self._room), 1.0)
            self.radius *= factor
            self.largest = max(self.largest, self.radius)
        return factor

    @property
    def _room(self) -> float:
        """The factor at which the radius would cost the budget, by what was measured; infinite without a loss."""
        # What was not measured is NaN.
        found = [lost for lost in (self.loss - self.spent, self.slope * self.radius) if lost > 0]
        return (self.allowed - self.spent) / max(found) if found else math.inf

    @property
    def renewable(self) -> bool:
        """Whether the last measurement says that the directions miss what the domain loses."""
        return self.astray and self.loss > RENEWED_FROM * self.allowed

    def move(self, turned: bool, loss: float | None = None) -> None:
        """The region's centre is where the weights are from now on; its size is to be found anew.

        Args:
            turned: Whether its directions are new. Raw predictions are then in another unit than those before.
            loss: Measured there, not corrected by the truth; by default the last one.
        """
        self.centre_loss = self.estimate if loss is None else loss
        # Of a step from now on, as the radius will be: the rate may have fallen since the first one.
        self.radius = self.largest = self.rate = 0.0
        self.astray = False
        if turned:
            self._forget_pairs()
            self.ceiling = math.inf

    def anchor(self, turned: bool) -> None:
        """The region's centre is the anchor again, and its size what it was.

        Args:
            turned: Whether its directions are new. The largest weight of any is 1, so a size keeps its meaning
                roughly; what a raw prediction costs in reward does not.
        """
        self.centre_loss, self.astray = 0.0, False
        self.loss = self.estimate = math.nan
        if turned:
            self._forget_pairs()

    def loosen(self) -> None:
        """The domain is trained again: what it needed before says nothing of where it will stand."""
        self.ceiling = math.inf

    def _forget_pairs(self) -> None:
        """Begin the calibration anew: raw predictions or losses are in another unit from now on."""
        self.xy = self.xx = self.ly = self.ll = self.lx = 0.0

    def _adapt(self, loss: float, subspace: float, residual: float) -> None:
        if self.radius <= 0 or not math.isfinite(loss) or not math.isfinite(subspace):
            return
        budget = self.allowed
        if loss <= 0.5 * budget:
            factor = GROW
        elif loss > 2 * budget:
            factor = SHRINK
        else:
            factor = budget / loss
        # From where the loss was measured. Regions that have no point in common leave the weights outside, and
        # one that shrank from its own radius there would pull ever harder at weights it cannot have.
        radius = max(self.radius, subspace) * factor
        if factor > 1:
            if subspace > SURFACE * self.radius:
                self.radius = min(radius, self.ceiling)
                # Only a measurement within the budget says that a radius was in order.
                self.largest = max(self.largest, self.radius)
        elif residual > subspace and radius < self.largest * FLOOR:
            # What is lost lies outside the directions: a smaller radius would only freeze learning.
            self.radius = min(self.radius, self.largest * FLOOR)
        else:
            self.radius = max(min(radius, self.ceiling), self.largest * LEAST)

    def state(self) -> dict[str, object]:
        """Everything as plain numbers and words, for JSON."""
        return asdict(self)
