"""Random directions: as many as a width bears, and what is estimated through them."""

from types import SimpleNamespace

import torch

from interference_guard.residual import fewer, full_matrices, rank_of, residual_matrices, residual_of


def block(*names, matrices=None, width=2560, kind="row"):
    views = tuple(SimpleNamespace(name=name, kind=kind) for name in names)
    return SimpleNamespace(views=views, matrices=matrices or len(names), width=width)


def test_wide_weights_get_fewer_and_none_gets_none():
    assert [fewer(width, 8) for width in (16, 512, 1024, 2560, 8192)] == [8, 8, 4, 1, 1]
    assert fewer(2560, 32) == 6


def test_wide_vectors_keep_fewer_directions_and_matrices_all():
    assert rank_of(block("norm", kind="vector"), 16) == 3
    assert rank_of(block("norm", kind="vector", width=128), 16) == 16
    assert rank_of(block("q"), 16) == 16


def test_narrow_weights_share_their_directions():
    (narrow,) = residual_matrices([block("a", "b", width=64)], 8, 0)
    assert narrow.shape == (64, 8)
    assert torch.equal(residual_of("b", 1, 64, 8, 0)[0], narrow)
    assert torch.equal(full_matrices([block("a", width=64)], 8, 0)[0], narrow)


def test_those_of_wide_weights_go_by_name_however_weights_are_stacked():
    together = residual_matrices([block("a", "b", width=1024)], 8, 0)[0]
    alone = [residual_matrices([block(name, width=1024)], 8, 0)[0] for name in "ab"]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(*alone)
    experts = residual_of("experts", 3, 1024, 8, 0)
    assert experts.shape == (3, 1024, 4)
    assert not torch.equal(experts[0], experts[1])


def test_lengths_are_right_in_the_sum_over_matrices_that_move_alike():
    # The worst case: one direction everywhere, so that every unit of a matrix errs alike.
    x = torch.randn(2560, generator=torch.Generator().manual_seed(0))
    R = residual_matrices([block(*(f"layer{index}" for index in range(200)))], 8, 0)[0]
    found = (x @ R).square().sum(-1) / x.square().sum()
    assert R.shape == (200, 2560, 1)
    assert float(found.max()) > 2
    # The standard error is 0.1.
    assert abs(float(found.mean()) - 1) < 0.3
