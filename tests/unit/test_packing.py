"""That a state holds every field of a domain."""

import json
from dataclasses import fields

import pytest
import torch
import torch.distributed.checkpoint as dcp

from interference_guard import Guard
from interference_guard.domain import MEANS, DomainState
from interference_guard.packing import PLAIN
from tests.unit.helpers import CONFIG, Toy, guarded, train

# Tensors, and parts that are saved as tables of their own; a domain's name is its key.
OTHERWISE = {
    "name",
    "curvature",
    "region",
    "model",
    "pending",
    "retained",
    "anchor_scores",
    "measurement",
    "gradient",
    "slopes",
    "radius",
    "subspace",
    "moved",
    "energy",
    "protected_set",
    "half_set",
    "start",
}


def another(value):
    """A value of the same kind that no field begins with."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [[1.5, 2.0]]
    return 7 if isinstance(value, int) or value is None else 0.375


def test_every_field_of_a_domain_is_saved_in_one_way():
    ways = [*PLAIN, *MEANS, *OTHERWISE]
    assert len(ways) == len(set(ways))
    assert {item.name for item in fields(DomainState)} == set(ways)


def test_every_plain_field_comes_back():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 2 + ["code"])
    untouched, state = guard.new_state("math"), guard.domains["math"]
    given = {name: another(getattr(untouched, name)) for name in PLAIN}
    for name, value in given.items():
        setattr(state, name, value)
    means = {name: (0.25 + number, 3.0) for number, name in enumerate(MEANS)}
    for name, sums in means.items():
        getattr(state, name).take()
        getattr(state, name).add(*sums)
    packed = guard.state_dict()
    read = Guard(Toy(), CONFIG)
    read.load_state_dict({"details": json.loads(json.dumps(packed["details"])), "tensors": packed["tensors"]})
    found = read.domains["math"]
    assert {name: getattr(found, name) for name in PLAIN} == given
    assert {name: getattr(found, name).sums() for name in MEANS} == means
    assert torch.equal(found.radius, state.radius)


def test_a_state_can_be_saved_by_torch(tmp_path):
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 2 + ["code"])
    torch.save(guard.state_dict(), tmp_path / "state")
    read = Guard(model, CONFIG)
    read.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert read.steps == 3
    assert read.raw("math") == guard.raw("math")


ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@ALONE
@pytest.mark.parametrize("whole", [True, False])
def test_a_distributed_checkpoint_refuses_a_guard(tmp_path, whole):
    """It would read what a new guard has alone, which is no domain, and one rank's rows for all."""
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 2 + ["code"])
    with pytest.raises(
        dcp.api.CheckpointException, match=r"guard\.torch\.distributed\.checkpoint holds no guard, call"
    ):
        dcp.save({"guard": guard if whole else guard.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    assert not list(tmp_path.glob("*.distcp"))


@ALONE
def test_a_distributed_checkpoint_changes_no_guard(tmp_path):
    """Of an earlier release, which let it save one."""
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 2 + ["code"])
    packed = guard.state_dict()
    dcp.save(
        {"guard": {key: packed[key] for key in ("details", "tensors")}}, checkpoint_id=tmp_path, no_dist=True
    )
    train(model, guard, optimizer, ["code"] * 2, start=3)
    before = {name: tensor.clone() for name, tensor in guard.state_dict()["tensors"].items()}
    with pytest.raises(dcp.api.CheckpointException, match="holds no guard, call its save"):
        dcp.load({"guard": guard}, checkpoint_id=tmp_path, no_dist=True)
    after = guard.state_dict()["tensors"]
    assert guard.steps == 5
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
