"""Two ranks, each with half of every parameter and half of the rows, do what one rank does."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from interference_guard.errors import StateError
from interference_guard.measuring import look
from tests.verl import host

PLAN = ["math"] * 3 + ["code"] * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return host.write_model(tmp_path_factory.mktemp("model"))


def ranks_of(model, out, plan, *begun, module="rank", world=2, pieces=-1):
    """Start ranks and wait for them; each holds one of so many pieces of a parameter, -1: of as many as ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", f"tests.verl.{module}"]
    with contextlib.ExitStack() as opened:
        ranks = []
        for rank in range(world):
            output = opened.enter_context((out / f"out{rank}").open("w"))
            arguments = [
                str(rank),
                str(world),
                str(port),
                model,
                out,
                ",".join(plan),
                str(pieces),
                *map(str, begun),
            ]
            ranks.append(subprocess.Popen(command + arguments, stdout=output, stderr=subprocess.STDOUT))
        try:
            codes = [rank.wait(timeout=300) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert not any(codes), "".join((out / f"out{rank}").read_text()[-3000:] for rank in range(world))
    return out


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """What two ranks wrote."""
    return ranks_of(model, tmp_path_factory.mktemp("two"), PLAN)


@pytest.fixture(scope="module")
def one(model):
    made = host.worker(model, host.SMALL)
    return made, host.train(made, PLAN)


def tables(folder, world=2):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def test_the_parameters_were_cut_and_the_rows_shared(two):
    assert [table["sharded"] for table in tables(two)] == [True, True]
    assert sum(table["rows"] for table in tables(two)) == host.SMALL["retain"]


def test_both_ranks_decide_the_same(two):
    first, second = tables(two)
    assert first == second


def test_they_agree_with_one_rank(two, one):
    assert_agrees(two, one)


# Sums over halves round in another order, and Adam divides by the root of what is nearly zero.
def assert_agrees(folder, one):
    made, metrics = one
    guard, found = made.engine.interference.guard, tables(folder)[0]
    assert found["losses"] == pytest.approx([loss for loss, _ in host.losses(metrics)], abs=2e-4)
    assert found["radius"] == pytest.approx(guard.domains["math"].radius.item(), rel=1e-2)
    assert found["measured"] == pytest.approx(guard.domains["math"].measurement.loss, abs=5e-3)
    expected = host.weights(made)
    moved = torch.load(folder / "weights0.pt")
    for name, tensor in moved.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=2e-3)


def test_two_copies_in_two_pieces_each_agree_with_one_rank(model, one, tmp_path):
    ranks_of(model, tmp_path, PLAN, world=4, pieces=2)
    first, *others = tables(tmp_path, 4)
    assert others == [first] * 3
    assert first["pieces"] == 2
    assert first["rows"] == host.SMALL["retain"] / 4
    assert_agrees(tmp_path, one)


def test_the_region_holds_on_two_ranks(two):
    for table in tables(two):
        assert table["inside"] <= table["radius"] * (1 + 1e-3)


def test_one_rank_takes_over_from_two(two, model):
    made = host.worker(model, host.SMALL)
    host.put_weights(made, torch.load(two / "weights0.pt"))
    made.engine.interference.checkpoints.load(two / "checkpoint/interference_guard_rank0")
    guard, found = made.engine.interference.guard, tables(two)[0]
    state = guard.domains["math"]
    assert len(state.retained) == host.SMALL["retain"]
    assert state.radius.item() == found["radius"]
    assert guard.raw_parts(["math"])["math"].inside == pytest.approx(found["inside"], rel=1e-3)
    # Which the first batch would say.
    made.engine.interference.temperature = 1.0
    assert look(guard, state).loss == pytest.approx(found["loss"], abs=1e-4)


def test_two_ranks_take_over_from_one(model, tmp_path):
    first = host.worker(model, host.SMALL)
    host.train(first, PLAN[:5])
    first.save_checkpoint(str(tmp_path / "checkpoint"), global_step=5)
    torch.save(host.weights(first), tmp_path / "weights0.pt")
    # veRL reads its own optimizer with as many ranks as before alone, so both go on with a new one.
    alone = host.worker(model, host.SMALL)
    host.put_weights(alone, host.weights(first))
    alone.engine.interference.checkpoints.load(tmp_path / "checkpoint/interference_guard_rank0")
    losses = [loss for loss, _ in host.losses(host.train(alone, PLAN[5:], start=5))]
    (tmp_path / "two").mkdir()
    for found in tables(ranks_of(model, tmp_path / "two", PLAN[5:], tmp_path, 5)):
        assert found["losses"] == pytest.approx(losses, abs=2e-4)
        guard = alone.engine.interference.guard
        assert found["radius"] == pytest.approx(guard.domains["math"].radius.item(), rel=1e-2)
        assert found["loss"] == pytest.approx(look(guard, guard.domains["math"]).loss, abs=5e-3)
        assert found["rows"] == host.SMALL["retain"] / 2
        assert found["inside"] <= found["radius"] * (1 + 1e-3)
    assert "weights are not those" not in (tmp_path / "two/out0").read_text()


def test_two_ranks_say_that_the_weights_are_others(two, model, tmp_path):
    """Of sharded models there are no checksums. Here the model is the one before training."""
    (tmp_path / "begun").mkdir()
    shutil.copytree(two / "checkpoint", tmp_path / "begun/checkpoint")
    (tmp_path / "two").mkdir()
    ranks_of(model, tmp_path / "two", ["code"], tmp_path / "begun", len(PLAN))
    for rank in range(2):
        assert "The weights are not those saved beside" in (tmp_path / f"two/out{rank}").read_text()


def test_a_missing_ranks_folder_is_an_error(two, model, tmp_path):
    made = host.worker(model, host.SMALL)
    for name, folder in (("interference_guard_rank1", "a"), ("interference_guard_rank0", "b")):
        shutil.copytree(two / "checkpoint" / name, tmp_path / folder / name)
    with pytest.raises(StateError, match="rank0/interference_guard.json does not exist"):
        made.engine.interference.checkpoints.load(tmp_path / "a/interference_guard_rank0")
    with pytest.raises(StateError, match=r"rank \[1\] is missing"):
        made.engine.interference.checkpoints.load(tmp_path / "b/interference_guard_rank0")


def test_ranks_refuse_together_what_is_of_several_attempts(model, tmp_path):
    ranks_of(model, tmp_path, [], module="attempts")
