"""The first-order term against the full mean gradient."""

import dataclasses

import pytest
import torch

from interference_guard.curvature import DomainCurvature, sketch_matrix
from interference_guard.first_order import GradientMean, first_order
from interference_guard.guard import Guard
from interference_guard.local_model import anchor_domain, displacements
from tests.unit.helpers import CONFIG, Toy, policy_gradient, rollout

WIDTH, UNITS, RANK = 40, 12, 6


def steps(count=30, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    span = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator)).Q.T
    mean = torch.randn(2, UNITS, RANK, generator=generator)
    return [
        (mean + torch.randn(2, UNITS, RANK, generator=generator)) @ span
        + noise * torch.randn(2, UNITS, WIDTH, generator=generator)
        for _ in range(count)
    ]


def dense_mean(gradients):
    total, count = torch.zeros_like(gradients[0]), 0.0
    for gradient in gradients:
        total, count = total * GradientMean.decay + gradient, count * GradientMean.decay + 1
    return total / count


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 3, 20])])
def test_equals_the_full_gradient_times_the_displacement(rows):
    omega = sketch_matrix(WIDTH, 16, 0)
    curvature, gradient = DomainCurvature(1.0, [omega]), GradientMean([omega])
    seen = steps()
    for step in seen:
        curvature.observe([step])
        gradient.observe([step])
    W = torch.randn(2, UNITS, WIDTH, generator=torch.Generator().manual_seed(1))
    model = anchor_domain(curvature, curvature.energies(), [W], [omega], [RANK], [rows])
    move = torch.randn(2, UNITS, WIDTH, generator=torch.Generator().manual_seed(2))
    (displacement,) = displacements([W + move], [model])
    product = dense_mean(seen) * move
    expected = product.sum() if rows is None else product.view(-1, WIDTH)[rows].sum()
    found = first_order(gradient.along(model), displacement.views)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_noise_outside_the_directions_does_not_take_over():
    omega = sketch_matrix(WIDTH, 16, 0)
    curvature, gradient = DomainCurvature(1.0, [omega]), GradientMean([omega])
    seen = steps(noise=0.1)
    for step in seen:
        curvature.observe([step])
        gradient.observe([step])
    model = anchor_domain(
        curvature, curvature.energies(), [torch.zeros(2, UNITS, WIDTH)], [omega], [RANK], [None]
    )
    U = model.blocks[0].U
    expected = (dense_mean(seen) @ U).flatten()
    found = gradient.along(model)[0].flatten()
    assert torch.nn.functional.cosine_similarity(found, expected, 0) > 0.99


def test_steps_that_are_not_finite_are_left_out():
    omega = sketch_matrix(WIDTH, 16, 0)
    clean, dirty = GradientMean([omega]), GradientMean([omega])
    for index, step in enumerate(steps(4)):
        clean.observe([step])
        dirty.observe([step])
        if index == 1:
            dirty.observe([torch.full_like(step, torch.nan)])
    torch.testing.assert_close(clean.sums[0], dirty.sums[0])
    assert clean.count == dirty.count


def test_predicts_an_improvement_of_an_unfinished_domain():
    # Going on along the domain's own gradient must read as a gain, the other way as a loss.
    model = Toy()
    guard = Guard(model, dataclasses.replace(CONFIG, first_order=True, project=False))
    policy_gradient(model, rollout(model, "math")).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    with guard.domain("math"):
        guard.retain("math", rollout(model, "math"))
        guard.before_step()
        guard.after_step()
    with guard.domain("code"):
        guard.before_step()
        for alpha, sign in ((-1e-3, -1), (2e-3, 1)):
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.add_(gradient, alpha=alpha)
            assert guard.raw_parts()["math"].linear * sign > 1e-6


def test_state_keeps_it():
    config = dataclasses.replace(CONFIG, first_order=True)
    model = Toy()
    guard = Guard(model, config)
    for name in ("math", "math", "code"):
        policy_gradient(model, rollout(model, name)).backward()
        with guard.domain(name):
            guard.retain(name, rollout(model, name))
            guard.before_step()
            guard.after_step()
    other = Guard(model, config)
    other.load_state_dict(guard.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    assert guard.raw_parts() == other.raw_parts()
    assert guard.raw_parts()["math"].linear != 0
    for a, b in zip(guard.domains["code"].gradient.sums, other.domains["code"].gradient.sums, strict=True):
        assert torch.equal(a, b)
