"""Ranks that hold the same weights and each rows of their own, in a loop of one's own."""

import re

import pytest
import torch

from interference_guard import Guard
from tests.distributed import replicas
from tests.distributed.ranks import run_ranks
from tests.unit.helpers import CONFIG, Toy

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("kept", "changes", "moves"),
    [
        # Directions too few for these domains: regions move, by one backward pass here and four there.
        ((32, 4), {"rank": 1, "sketch": 2}, True),
        # One rank has nothing to score.
        ((32, 0), {}, False),
    ],
)
def test_ddp_with_buffers_agrees_where_ranks_keep_unequal_rows(kept, changes, moves, tmp_path):
    (weights, *first), (others, *second) = run_ranks(2, replicas.uneven, kept, changes, folder=tmp_path)
    assert torch.equal(weights, others)
    assert first == second
    renewals, loss, differentiates = first
    assert loss == loss
    assert differentiates
    assert bool(renewals) == moves


def test_ranks_pass_forward_as_often_where_frozen_weights_alone_are_sharded(tmp_path):
    (weights, *first), (others, *second) = run_ranks(2, replicas.adapted, (32, 0), folder=tmp_path)
    assert torch.equal(weights, others)
    assert first == second
    assert first[1:] == [1, True]


def test_bf16_weights_that_all_ranks_hold_round_alike_beside_uneven_pieces(tmp_path):
    (weights, projected), (others, _) = run_ranks(2, replicas.rounded, 15, folder=tmp_path)
    assert any(sum(table.values()) for table in projected.values())
    assert torch.equal(weights, others)


def test_evaluations_of_each_ranks_own_rows_count_by_their_mean(tmp_path):
    first, second = run_ranks(2, replicas.graded, (0.9, 0.3), folder=tmp_path / "both")
    assert first == second
    assert first[0] == pytest.approx(0.6)
    first, second = run_ranks(2, replicas.graded, (float("nan"), 0.3), folder=tmp_path / "one")
    assert first == second
    assert first[0] == pytest.approx(0.3)


@pytest.mark.parametrize(("how", "ranks", "parts"), [("whole", 2, 1), ("hybrid", 4, 2)])
def test_replicas_save_into_folders_of_their_own(how, ranks, parts, tmp_path):
    found = run_ranks(ranks, replicas.saved, how, str(tmp_path / "state"), folder=tmp_path)
    rows = []
    for message, before, after in found:
        assert re.match(rf"StateError: {ranks} ranks keep .* lies in {parts} different parts", message)
        assert before == after
        rows += before
    # One process takes all of them.
    guard = Guard(Toy(), CONFIG)
    guard.load(tmp_path / "state/0", ranks=[tmp_path / f"state/{rank}" for rank in range(ranks)])
    assert sorted(replicas.kept_rows(guard)) == sorted(rows)
