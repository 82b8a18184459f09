import dataclasses
import warnings

import pytest
import torch
from torch import nn

from interference_guard import ConfigError, Guard, GuardConfig, GuardedOptimizer
from interference_guard.weighing import FLOOR, coordinate_metric
from tests.unit.helpers import CONFIG, guarded, train


def two_units(metric, first_unit):
    """What is left of two foreign steps that train the first unit by its share, the other by the rest.

    Both units carry the protected domain alike, along one direction.
    """
    model = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    guard = Guard(model, GuardConfig(rank=1, sketch=4, projection_metric=metric))
    optimizer = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), guard)
    direction = torch.eye(8)[0]

    def step(domain, gradient, rate):
        model.weight.grad = gradient
        optimizer.param_groups[0]["lr"] = rate
        with guard.domain(domain), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no completions are retained here
            optimizer.step()

    step("kept", torch.stack([direction, direction]), 0.0)
    # The first one sets the radius to what it moves; the second goes the same way again and is brought back.
    for _ in range(2):
        step("trained", torch.stack([direction * share for share in (first_unit, 2 - first_unit)]), 1.0)
    state = guard.domains["kept"]
    assert state.subspace.item() == pytest.approx(state.radius.item(), rel=1e-3)
    return model.weight[:, 0].detach().abs()


def test_units_that_the_trained_domain_uses_keep_more():
    euclidean, gradient = (two_units(metric, 1.6) for metric in ("euclidean", "gradient"))
    # Both units weigh alike in the region: the Euclidean point shrinks both by the same factor.
    assert euclidean[0] / euclidean[1] == pytest.approx(4.0, rel=1e-3)
    assert gradient[0] / gradient[1] > 6.0
    assert gradient[0] > euclidean[0]


def test_equal_units_are_projected_as_without_a_metric():
    euclidean, gradient = (two_units(metric, 1.0) for metric in ("euclidean", "gradient"))
    torch.testing.assert_close(gradient, euclidean)


@pytest.mark.parametrize("coverage", [1.0, 0.5])
def test_a_coordinate_weighs_what_its_unit_does(coverage):
    model, guard, optimizer = guarded(config=dataclasses.replace(CONFIG, coverage=coverage))
    train(model, guard, optimizer, ["math"] * 3 + ["code"])
    local = guard.domains["math"].model
    energies = [torch.rand_like(block.energy) for block in local.blocks]
    found = coordinate_metric(local, energies)
    values, ranks = [], []
    for block, energy in zip(local.blocks, energies, strict=True):
        flat = energy.flatten() / block.width
        chosen = flat if block.rows is None else flat[block.rows]
        values += chosen.tolist()
        ranks += [block.rank] * len(chosen)
    values = torch.tensor(values)
    expected = (values / values.mean()).clamp(min=FLOOR).repeat_interleave(torch.tensor(ranks))
    torch.testing.assert_close(found, expected)
    assert len(found) == sum(block.z0.numel() for block in local.blocks)


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_without_energy_all_count_alike(size):
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3 + ["code"])
    local = guard.domains["math"].model
    found = coordinate_metric(local, [torch.full_like(block.energy, size) for block in local.blocks])
    assert found.isfinite().all()
    assert (found > 0).all()
    if size == 0.0:
        assert (found == 1).all()


def test_a_step_of_several_domains_is_projected_as_without_a_metric():
    ends = []
    for metric in ("euclidean", "gradient"):
        model, guard, optimizer = guarded(config=dataclasses.replace(CONFIG, projection_metric=metric))
        train(model, guard, optimizer, ["math"] * 5)
        for step in range(6):
            guard.begin({"code": 0.5, "qa": 0.5})
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # mixed steps are warned of
                optimizer.step()
        assert guard.metrics()["guard/update_kept"] < 0.99, "the projection must have acted"
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_another_metric_is_refused():
    with pytest.raises(
        ConfigError, match=r"projection_metric='fisher' is not allowed: it must be one of \['euclidean'"
    ):
        GuardConfig(projection_metric="fisher")
