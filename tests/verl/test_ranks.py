"""Two ranks, each with half of every parameter and half of the rows, do what one rank does."""

import contextlib
import json
import socket
import subprocess
import sys

import pytest
import torch

from interference_guard.errors import StateError
from tests.verl import host

PLAN = ["math"] * 3 + ["code"] * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return host.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """What two ranks wrote."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.verl.rank"]
    with contextlib.ExitStack() as opened:
        ranks = []
        for rank in range(2):
            output = opened.enter_context((out / f"out{rank}").open("w"))
            arguments = [str(rank), "2", str(port), model, out, ",".join(PLAN)]
            ranks.append(subprocess.Popen(command + arguments, stdout=output, stderr=subprocess.STDOUT))
        try:
            codes = [rank.wait(timeout=500) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert codes == [0, 0], "".join((out / f"out{rank}").read_text()[-3000:] for rank in range(2))
    return out


@pytest.fixture(scope="module")
def one(model):
    made = host.worker(model, host.SMALL)
    return made, host.train(made, PLAN)


def tables(two):
    return [json.loads((two / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_the_parameters_were_cut_and_the_rows_shared(two):
    assert [table["sharded"] for table in tables(two)] == [True, True]
    assert sum(table["rows"] for table in tables(two)) == host.SMALL["retain"]


def test_both_ranks_decide_the_same(two):
    first, second = tables(two)
    assert first == second


# Sums over two halves round in another order, and Adam divides by the root of what is nearly zero.
def test_they_agree_with_one_rank(two, one):
    made, metrics = one
    guard, found = made.engine.interference.guard, tables(two)[0]
    assert found["losses"] == pytest.approx([loss for loss, _ in host.losses(metrics)], abs=2e-4)
    assert found["radius"] == pytest.approx(guard.domains["math"].radius.item(), rel=1e-2)
    assert found["measured"] == pytest.approx(guard.domains["math"].measurement.loss, abs=5e-3)
    expected = host.weights(made)
    moved = torch.load(two / "weights0.pt")
    for name, tensor in moved.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=2e-3)


def test_the_region_holds_on_two_ranks(two):
    for table in tables(two):
        assert table["inside"] <= table["radius"] * (1 + 1e-3)


def test_another_number_of_ranks_is_refused(two, model):
    made = host.worker(model, host.SMALL)
    with pytest.raises(StateError, match="resume with as many ranks"):
        made.engine.interference.load(two / "checkpoint/interference_guard_rank0")
