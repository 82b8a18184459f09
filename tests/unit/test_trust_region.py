import dataclasses
import math

import pytest

from interference_guard.probe import Measurement
from interference_guard.trust_region import FLOOR, Raw, TrustRegion


def region(radius=1.0):
    return TrustRegion(0.02, 0.01, radius=radius, largest=radius)


def measured(region, found, raw, adapt=True, noise=0.0):
    return region.measured(found, raw, adapt=adapt, noise=noise)


def found(loss, ratio="sequence"):
    return Measurement("d", loss, 0.0, 1.0, ratio)


@pytest.mark.parametrize(
    ("loss", "subspace", "residual", "radius"),
    [
        (0.005, 1.0, 0.0, 2.0),  # under half the budget, at the surface: grows
        (-0.5, 1.0, 0.0, 2.0),
        (0.005, 0.5, 0.0, 1.0),  # not at the surface: stays
        (0.016, 1.0, 0.0, 1.25),  # budget / loss
        (0.025, 1.0, 0.0, 0.8),
        (0.025, 0.1, 0.0, 0.8),  # shrinking does not wait for the surface
        (0.5, 1.0, 0.0, 0.5),
        (0.5, 0.4, 0.6, 0.5),  # the residual leads, the floor is far
        (0.005, 3.0, 0.0, 6.0),  # left outside by other regions, and harmless there
        (0.025, 3.0, 0.0, 2.4),  # over budget: from there on
        (0.5, 3.0, 0.0, 1.5),
    ],
)
def test_radius_follows_the_measurement(loss, subspace, residual, radius):
    control = region()
    measured(control, found(loss), Raw(subspace, residual))
    assert control.radius == pytest.approx(radius)


def test_radius_stops_at_the_floor_where_the_residual_leads():
    control = region()
    for _ in range(20):
        measured(control, found(0.5), Raw(0.01, 0.5))
    assert control.radius == FLOOR
    measured(control, found(0.005), Raw(FLOOR, 0.5))
    assert control.radius == 2 * FLOOR


def test_radius_has_no_floor_where_the_subspace_leads():
    control = region()
    for _ in range(20):
        measured(control, found(0.5), Raw(control.radius, 0.01 * control.radius))
    assert control.radius == pytest.approx(0.5**20)


def test_radius_stays_near_weights_that_it_cannot_have():
    control = region()
    for _ in range(20):
        measured(control, found(0.5), Raw(0.8, 0.01))
    assert control.radius == pytest.approx(0.4), "half of where the weights are, measurement after measurement"


def test_only_a_loss_within_the_budget_raises_the_floor():
    control = region()
    for _ in range(10):
        measured(control, found(0.5), Raw(160.0, 0.01))
    assert control.radius == 80.0
    assert control.largest == 1.0
    measured(control, found(0.005), Raw(80.0, 0.01))
    assert control.largest == 160.0


def test_prediction_is_calibrated_by_measurements():
    control = region()
    assert math.isnan(control.predict(Raw(1.0, 0.0)))
    for raw in (0.1, 0.2, 0.4):
        measured(control, found(0.05 * raw), Raw(raw, 0.0))
    assert control.predict(Raw(2.0, 0.0)) == pytest.approx(0.1)
    assert measured(control, found(0.02), Raw(0.4, 0.0)).predicted == pytest.approx(0.02)


def test_a_change_of_unit_forgets_the_old_pairs():
    control = region()
    measured(control, found(0.5), Raw(1.0, 0.0))
    measured(control, found(0.003, "nats"), Raw(1.0, 0.0))
    assert control.predict(Raw(1.0, 0.0)) == pytest.approx(0.003)


def test_nats_have_their_own_budget():
    control = region()
    measured(control, found(0.02, "nats"), Raw(1.0, 0.0))
    assert control.radius == pytest.approx(0.5)


def test_truth_scales_later_measurements_and_is_shrunk_toward_one():
    control = region()
    measured(control, found(0.04), Raw(1.0, 0.0))
    control.truth(0.02)
    assert 0.5 < control.scale < 1.0
    before = control.scale
    for _ in range(20):
        measured(control, found(0.04), Raw(1.0, 0.0))
        control.truth(0.02)
    assert 0.5 < control.scale < before
    assert measured(control, found(0.04), Raw(1.0, 0.0)).loss == pytest.approx(0.04 * control.scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_measurement_that_is_no_number_leaves_the_calibration(bad):
    control = region()
    measured(control, found(0.01), Raw(1.0, 0.0, 0.5))
    before = control.state()
    measured(control, found(bad), Raw(1.0, 0.0))
    measured(control, found(0.01), Raw(1.0, bad))
    measured(control, found(0.01), Raw(1.0, 0.0, bad))
    after = control.state()
    assert {**after, "loss": 0, "estimate": 0, "radius": 0} == {**before, "loss": 0, "estimate": 0, "radius": 0}


@pytest.mark.parametrize(
    ("loss", "factor"),
    # Not measured; nothing lost; within half the budget, and up to all of it; beyond.
    [(math.nan, 9.0), (-0.01, 9.0), (0.001, 9.0), (0.005, 4.0), (0.011, 1.0)],
)
def test_a_radius_follows_a_rising_learning_rate(loss, factor):
    control = TrustRegion(0.02, 0.01)
    # Of the step that sets the radius nothing more is known.
    assert control.grow_with_rate(1e-6) == 1
    control.radius = control.largest = 1.0
    control.loss = loss
    assert control.grow_with_rate(3e-6) == pytest.approx(factor)
    assert control.radius == control.largest == pytest.approx(factor)
    # Neither a lower rate nor one that is not known changes it, nor one that was reached before.
    for rate in (1e-6, math.nan, 3e-6):
        assert control.grow_with_rate(rate) == 1


def test_a_rising_learning_rate_stops_where_the_radius_would_cost_the_budget():
    control = region()
    control.grow_with_rate(1e-6)
    # Measured well inside of the region, whose surface is expected to cost four times as much.
    measured(control, found(0.001), Raw(0.25, 0.0))
    assert control.grow_with_rate(1e-5) == pytest.approx(5.0)
    assert control.predict(Raw(control.radius, 0.0)) == pytest.approx(0.02)
    assert control.grow_with_rate(1e-4) == 1
    # Of a region that was moved, what is spent already stays spent.
    moved = region()
    measured(moved, found(0.004), Raw(1.0, 0.0))
    moved.move(turned=False)
    moved.grow_with_rate(1e-6)
    moved.radius = moved.largest = 1.0
    assert moved.grow_with_rate(1e-5) == pytest.approx((0.02 - 0.004) / 0.004)
    assert moved.predict(Raw(moved.radius, 0.0)) == pytest.approx(0.02)


def test_a_moved_region_begins_at_the_rate_of_its_next_step():
    control = region()
    control.grow_with_rate(1e-3)
    measured(control, found(0.001), Raw(1.0, 0.0))
    control.move(turned=True)
    # A schedule that restarts: the first step is small, and the radius would stay of its size.
    assert control.grow_with_rate(1e-5) == 1
    control.radius = control.largest = 1.0
    assert control.grow_with_rate(3e-5) == pytest.approx(9.0)


@pytest.mark.parametrize("turned", [False, True])
def test_a_new_anchor_keeps_the_radius_and_what_its_directions_have_cost(turned):
    control = region()
    measured(control, found(0.02), Raw(1.0, 0.0))
    control.anchor(turned)
    assert (control.radius, control.largest) == (1.0, 1.0)
    prediction = control.predict(Raw(2.0, 0.0))
    # New directions have their own unit of reward, which nothing has measured yet.
    assert math.isnan(prediction) if turned else prediction == pytest.approx(0.04)
    # The loss was the old anchor's.
    control.grow_with_rate(1e-6)
    assert control.grow_with_rate(2e-6) == pytest.approx(4.0 if turned else 1.0)
    measured(control, found(0.03), Raw(1.0, 0.0))
    if turned:
        assert control.predict(Raw(2.0, 0.0)) == pytest.approx(0.06)


def test_ratios_of_sequences_and_of_tokens_are_corrected_apart():
    control = region()
    measured(control, found(0.04), Raw(1.0, 0.0))
    control.truth(0.02)
    of_sequences = control.scale
    assert of_sequences < 1
    # Normalised by length a loss of .2 shows as .05.
    result = measured(control, found(0.05, "token"), Raw(2.0, 0.0))
    assert result.loss == 0.05
    assert control.predict(Raw(4.0, 0.0)) == pytest.approx(0.1), "pairs of the other kind are forgotten"
    for _ in range(20):
        control.truth(0.2)
    assert control.scale > 3
    assert control.correction("sequence") == of_sequences
    again = TrustRegion(**control.state())
    assert measured(again, found(0.04), Raw(1.0, 0.0)).loss == pytest.approx(0.04 * of_sequences)


def test_a_rising_learning_rate_stops_at_the_ceiling():
    control = region()
    control.grow_with_rate(1e-6)
    control.ceiling = 2.0
    assert control.grow_with_rate(1e-5) == 2
    assert control.radius == 2
    control.ceiling = 1.0
    assert control.grow_with_rate(1e-4) == 1


def test_a_measurement_that_is_no_number_changes_no_radius():
    control = region()
    measured(control, found(math.nan), Raw(1.0, 0.0))
    measured(control, found(0.5), Raw(math.inf, 0.0))
    assert (control.radius, control.largest) == (1.0, 1.0)


def test_a_region_that_needed_a_recovery_does_not_grow_back():
    control = region()
    control.tighten(0.0)
    assert control.radius == 0.5
    for _ in range(5):
        measured(control, found(0.001), Raw(0.5, 0.0))
    assert control.radius == 0.5
    control.tighten(0.0)
    measured(control, found(0.001), Raw(0.25, 0.0))
    assert control.radius == 0.25
    # Smaller is still possible, and its own training sets it free.
    measured(control, found(0.03), Raw(0.25, 0.0))
    assert control.radius < 0.25
    control.loosen()
    for _ in range(5):
        measured(control, found(0.001), Raw(control.radius, 0.0))
    assert control.radius > 1.0


def test_recoveries_stop_at_the_floor():
    control = region()
    for _ in range(40):
        control.tighten(0.0)
    assert control.radius == control.ceiling == FLOOR
    # A region that measurements have brought below it stays where it is.
    control.radius = FLOOR / 4
    control.tighten(0.0)
    assert control.radius == control.ceiling == FLOOR / 4


def test_a_region_that_the_weights_are_outside_of_is_not_tightened():
    control = region()
    control.tighten(1.5)
    assert control.radius == 1.0
    assert control.ceiling == math.inf
    control.tighten(1.05)
    assert control.radius == 0.5


def test_a_region_without_a_radius_cannot_be_tightened():
    control = dataclasses.replace(region(), radius=0.0, largest=0.0)
    control.tighten(0.0)
    assert control.radius == 0.0
    assert control.ceiling == math.inf


def test_state_round_trip():
    control = region()
    measured(control, found(0.03), Raw(1.0, 0.2))
    assert TrustRegion(**control.state()) == control


def test_radius_never_vanishes():
    control = region()
    for _ in range(300):
        measured(control, found(0.5), Raw(control.radius, 0.01 * control.radius))
    assert control.radius == pytest.approx(1e-9)


def test_without_a_projection_the_radius_stays():
    control = region()
    measured(control, found(0.5), Raw(0.5, 0.01), adapt=False)
    assert control.radius == 1.0
    assert control.predict(Raw(0.51, 0.0)) == pytest.approx(0.5)


def test_a_linear_part_is_fitted_beside_the_quadratic_one():
    control = region()
    for x, linear in ((0.1, -1.0), (0.4, -1.5), (1.0, -1.8), (2.0, -2.0)):
        measured(control, found(0.05 * x + 0.02 * linear), Raw(0.8 * x, 0.2 * x, linear))
    assert control.slopes == pytest.approx((0.05, 0.02))
    assert control.predict(Raw(0.5, 0.0, -3.0)) == pytest.approx(0.025 - 0.06)


@pytest.mark.parametrize(
    ("pairs", "slopes"),
    [
        (((1.0, 1.0, 0.05), (2.0, 2.0, 0.1)), (0.05, 0.0)),  # parallel: cannot be told apart
        (((1.0, -1.0, 0.1), (2.0, -0.5, 0.06)), (None, 0.0)),  # the linear part would be negative
        (((1.0, 2.0, 0.1), (2.0, 1.0, 0.01)), (0.0, None)),  # the quadratic part would be negative
    ],
)
def test_no_part_of_the_fit_is_negative(pairs, slopes):
    control = region()
    for x, linear, loss in pairs:
        measured(control, found(loss), Raw(x, 0.0, linear))
    for value, expected in zip(control.slopes, slopes, strict=True):
        assert value > 0 if expected is None else value == pytest.approx(expected)
