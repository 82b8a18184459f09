import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interference_guard.projection import shrinkage, subspace_energy
from tests.reference import nearest_in_ellipsoid

SCALES = st.floats(-12, 6).map(lambda power: 10.0**power)


@st.composite
def regions(draw):
    """Coordinates, weights and a radius, each at its own scale."""
    size = draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = torch.randn(size, generator=generator) * draw(SCALES)
    w = torch.rand(size, generator=generator) ** draw(st.integers(1, 6)) * draw(SCALES)
    w[torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
    energy = float((w.double() * z.double().square()).sum() / 2)
    radius = max(energy * draw(st.floats(1e-4, 2.0)), 1e-36)
    return z, w, torch.tensor(radius, dtype=torch.float32)


def nearest_point(z, w, radius):
    return shrinkage(z, w, radius) * z


def energy_of(z, w):
    return float((w.double() * z.double().square()).sum() / 2)


@settings(max_examples=400, deadline=None)
@given(region=regions())
def test_point_is_inside_and_the_nearest(region):
    z, w, radius = region
    point = nearest_point(z, w, radius)
    assert energy_of(point, w) <= float(radius) * (1 + 1e-3)
    truth = nearest_in_ellipsoid(z, w, float(radius))
    gap = (point.double() - truth).norm() / max(float(z.double().norm()), 1e-300)
    assert gap < 1e-3


@settings(max_examples=200, deadline=None)
@given(region=regions(), seed=st.integers(0, 2**31))
def test_point_is_the_nearest_in_a_metric(region, seed):
    z, w, radius = region
    metric = torch.rand(len(z), generator=torch.Generator().manual_seed(seed)) * 10 + 0.01
    point = shrinkage(z, w, radius, metric) * z
    assert energy_of(point, w) <= float(radius) * (1 + 1e-3)
    # Measured in units in which the metric is the Euclidean one.
    root = metric.double().sqrt()
    truth = nearest_in_ellipsoid(z.double() * root, w.double() / root.square(), float(radius))
    gap = (point.double() * root - truth).norm() / max(float((z.double() * root).norm()), 1e-300)
    assert gap < 1e-3


@settings(max_examples=200, deadline=None)
@given(region=regions())
def test_optimality_conditions_hold(region):
    z, w, radius = region
    point = nearest_point(z, w, radius)
    if energy_of(z, w) <= float(radius) * (1 - 1e-5):
        assert torch.equal(point, z)
        return
    # Stationarity: (z - p) = mu w p with one mu >= 0 for all coordinates; complementarity: on the surface.
    z64, p64, w64 = z.double(), point.double(), w.double()
    assert energy_of(point, w) >= float(radius) * (1 - 1e-3)
    mu = float(((z64 - p64) * w64 * p64).sum() / (w64 * p64).square().sum().clamp(min=1e-300))
    assert mu >= 0
    slack = (z64 - p64 - mu * w64 * p64).norm() / z64.norm()
    assert slack < 1e-3


@settings(max_examples=100, deadline=None)
@given(region=regions())
def test_second_projection_changes_nothing_visible(region):
    z, w, radius = region
    once = nearest_point(z, w, radius)
    twice = nearest_point(once, w, radius * (1 + 1e-3))
    assert torch.equal(once, twice)


@settings(max_examples=100, deadline=None)
@given(region=regions(), larger=st.floats(1.01, 10.0))
def test_a_larger_region_moves_the_point_less(region, larger):
    z, w, radius = region
    near, far = nearest_point(z, w, radius * larger), nearest_point(z, w, radius)
    assert (z - near).double().norm() <= (z - far).double().norm() * (1 + 1e-4) + 1e-30


def test_weights_of_zero_are_left_alone():
    z = nearest_point(torch.tensor([3.0, 5.0]), torch.tensor([2.0, 0.0]), torch.tensor(1.0))
    torch.testing.assert_close(z, torch.tensor([1.0, 5.0]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_left_alone(value):
    z = torch.tensor([1.0, value, 2.0])
    assert shrinkage(z, torch.ones(3), torch.tensor(0.1)).tolist() == [1.0, 1.0, 1.0]


def test_the_largest_multiplier_is_a_number():
    # The root lies at 1e39.
    z, w, radius = torch.tensor([1e5, 0.0]), torch.tensor([1e-28, 100.0]), torch.tensor(5e-37)
    assert energy_of(nearest_point(z, w, radius), w) <= float(radius) * (1 + 1e-3)


def test_energy_is_the_halved_weighted_square():
    assert subspace_energy(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).item() == 9.5
