"""How rows are scored where a forward pass takes all ranks."""

from types import SimpleNamespace

import pytest
import torch

from interference_guard.measuring import score
from interference_guard.probe import Completions

ALIKE = Completions(*[torch.tensor([[3, 4], [1, 2], [3, 4], [3, 4]])] * 3)
APART = Completions(*[torch.tensor([[5, 6], [7, 8], [9, 1]])] * 3)


def rank(most, passes, sharded=True, temperatures=None):
    """`score` on one rank where all pass forward at once; another has `most` different rows, of four tokens."""
    view = SimpleNamespace(gathered=sharded, reshard=lambda: None)
    ranks = SimpleNamespace(limits=lambda low, high, device: (min(-4.0, low), float(max(most, high))))

    def policy(rows):
        passes.append(tuple(rows.input_ids.shape))
        if temperatures is not None:
            temperatures.append(rows.temperature)
        return rows.input_ids.float()

    guard = SimpleNamespace(view=view, ranks=ranks, device=torch.device("cpu"), scores_together=not sharded)
    return lambda rows: score(guard, SimpleNamespace(retained=rows, temperature=0.7), policy)


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("rows", [ALIKE, APART, None], ids=["alike", "apart", "none"])
def test_every_rank_scores_as_many_rows_of_one_width(rows, sharded):
    passes = []
    found = rank(3, passes, sharded)(rows)
    assert passes == [(3, 4)]
    if rows is None:
        assert found is None
    else:
        assert torch.equal(found, rows.input_ids.float()), "every row has its own score, in its own place"


@pytest.mark.parametrize("rows", [APART, None], ids=["apart", "none"])
def test_every_rank_scores_at_one_temperature(rows):
    temperatures = []
    rank(3, [], temperatures=temperatures)(rows)
    assert temperatures == [0.7]


def test_nothing_is_scored_where_no_rank_has_rows():
    passes = []
    assert rank(0, passes)(None) is None
    assert passes == []


def test_weights_that_lie_sharded_do_so_again_where_a_policy_fails():
    resharded = []
    view = SimpleNamespace(gathered=False, reshard=lambda: resharded.append(True))
    guard = SimpleNamespace(view=view, device=torch.device("cpu"), scores_together=False)

    def policy(rows):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        score(guard, SimpleNamespace(retained=APART, temperature=1.0), policy)
    assert resharded == [True]
