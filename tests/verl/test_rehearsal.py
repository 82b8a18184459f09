"""Rows of an earlier domain in an update, of which mini-batches have very different shares."""

import pytest

from tests.verl import host


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return host.write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("first", [False, True])
def test_every_mini_batch_trains_what_its_update_does(model, first):
    made = host.worker(model, host.SMALL | {"active_share": 0.5})
    host.train(made, ["math"] * 2)
    guard = made.engine.interference.guard
    # As veRL sorts them, by length or arrival: one mini-batch of four is of the earlier domain alone.
    old, new = ["math"] * 8, ["code"] * 24
    for step in (2, 3):
        names = old + new if first else new + old
        made.train_mini_batch(host.batch(step, ("code",), rows=32, mini=8, data_source=names))
    assert guard.steps == 2 + 8
    assert guard.trained == ("code",)
    math, code = guard.domains["math"], guard.domains["code"]
    assert (math.anchored, math.foreign_steps, code.own_steps) == (True, 8, 8)
    assert not math.pending
    assert sum(map(len, code.pending)) == 48
    assert guard.raw_parts(["math"])["math"].inside <= math.radius.item() * (1 + 1e-3)
