import copy
import dataclasses

import pytest
import torch

from interference_guard import Guard, GuardedOptimizer
from interference_guard.places import place
from tests.unit.helpers import CONFIG, guarded, train


def test_modules_of_one_name_in_a_layer_have_places_of_their_own():
    attention, mlp = (place(f"transformer.h.3.{part}.c_proj.bias") for part in ("attn", "mlp"))
    assert attention == (3, "attn.c_proj")
    assert mlp == (3, "mlp.c_proj")


def record_changes(guard):
    """Squared length of everything projections subtract from the weights, by parameter."""
    sums, subtract = {}, guard.view.subtract

    def seen(changes, step):
        before = {name: parameter.detach().clone() for name, parameter in guard.model.named_parameters()}
        subtract(changes, step)
        for name, parameter in guard.model.named_parameters():
            sums[name] = sums.get(name, 0.0) + float((parameter.detach() - before[name]).square().sum())

    guard.view.subtract = seen
    return sums


@pytest.mark.parametrize("coverage", [1.0, 0.6])
def test_projected_places_are_what_left_the_weights(coverage):
    model, guard, optimizer = guarded(config=dataclasses.replace(CONFIG, coverage=coverage))
    expected = record_changes(guard)
    train(model, guard, optimizer, ["math"] * 5 + ["code"] * 20)
    found = guard.places()["projected"]
    assert set(found) == {"math"}
    modules = {name.split(".")[-2]: value for name, value in expected.items() if name != "norm.weight"}
    modules["norm"] = expected["norm.weight"] + expected["norm.bias"]
    assert found["math"] == pytest.approx(
        {(None, name): value for name, value in modules.items()}, rel=1e-3, abs=1e-9
    )
    assert sum(expected.values()) > 0


def test_each_domain_has_its_own_account():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 5 + ["code"] * 5)
    before = guard.places()["projected"]["math"]
    train(model, guard, optimizer, ["qa"] * 5, start=10)
    found = guard.places()["projected"]
    assert set(found) == {"math", "code"}
    assert all(found["math"][key] >= value for key, value in before.items())


def test_curvature_places_are_the_energies_of_the_units():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 5 + ["code"] * 2)
    found = guard.places()["curvature"]
    assert list(found) == ["math", "code"]
    energies = sum(float(sums.energy.sum()) for sums in guard.domains["math"].curvature.sums)
    assert sum(found["math"].values()) == pytest.approx(energies)


def test_the_account_goes_on_where_a_state_left_it(tmp_path):
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 5 + ["code"] * 5)
    guard.save(tmp_path)
    other = Guard(model, CONFIG)
    other.load(tmp_path)
    assert other.places() == guard.places()
    inner = optimizer.detach()
    ends = []
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    momentum = copy.deepcopy(inner.state_dict())
    for item in (guard, other):
        model.load_state_dict(weights)
        inner.load_state_dict(copy.deepcopy(momentum))
        wrapped = GuardedOptimizer(inner, item)
        train(model, item, wrapped, ["code"] * 5, start=10)
        wrapped.detach()
        ends.append(item.places())
    assert ends[0] == ends[1]


def test_a_guard_that_is_off_has_none():
    _, guard, _ = guarded(config=dataclasses.replace(CONFIG, enabled=False))
    assert guard.places() == {"curvature": {}, "projected": {}}


def test_watching_alone_takes_nothing_back():
    model, guard, optimizer = guarded(config=dataclasses.replace(CONFIG, project=False))
    train(model, guard, optimizer, ["math"] * 5 + ["code"] * 5)
    assert guard.places()["projected"] == {}
    assert torch.isfinite(torch.tensor(list(guard.places()["curvature"]["math"].values()))).all()
