"""Ranges of elements in unit view; on real ranks in tests/distributed/test_zero.py."""

import math

import pytest
import torch

from interference_guard.flat import Cut
from interference_guard.shards import Shards
from interference_guard.units import UnitView

VIEWS = {
    "row": UnitView("w", "row", (6, 5)),
    "column": UnitView("w", "column", (6, 5)),
    "vector": UnitView("w", "vector", (7,)),
    "experts": UnitView("w", "row", (3, 4, 5), stacked=True),
    "experts, transposed": UnitView("w", "column", (3, 4, 5), stacked=True),
    "four axes": UnitView("w", "row", (2, 3, 2, 4)),
}
# Offset in the buffer, elements of a rank: rows cut within, cut between, a rank for each, one for all.
CUTS = [(0, 7), (3, 11), (0, 15), (20, 10), (4, 3), (1, 200), (0, 20)]


def pieces(view, cut):
    """Per rank the region of a block of the parameter alone, and its piece."""
    shape = tuple(view.view(torch.empty(view.shape)).shape)
    shape = shape if len(shape) == 3 else (1, *shape)
    numel = math.prod(view.shape)
    for rank in range(-(-(cut[0] + numel) // cut[1]) + 1):
        shards = Shards.planned({"w": (view.shape, list(cut))}, rank, 99)
        yield shards.region([view], shape), shards.view(view), shards.parts["w"]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_pieces_add_up_to_the_whole(view, cut):
    whole = torch.randn(view.shape)
    seen = view.view(whole)
    seen = seen if seen.dim() == 3 else seen.unsqueeze(0)
    total, units = torch.zeros(seen.shape), torch.zeros(seen.shape[:2])
    sketch = torch.randn(seen.shape[0], seen.shape[2], 3)
    dealt, dealt_units = torch.zeros_like(sketch), torch.zeros(*seen.shape[:2], 2)
    values, apart = torch.randn(*seen.shape[:2], 2), []
    for region, piece, part in pieces(view, cut):
        flat = whole.flatten()[part.start : part.start + part.length]
        box = piece.view(flat)
        # What the range's own elements become under a change of the box.
        assert torch.equal(piece.back(box), flat)
        box = box if box.dim() == 3 else box.unsqueeze(0)
        assert box.shape == region.size
        total[region.box] += box
        units += region.spread_units(box.square().sum(-1))
        region.across(dealt).add_(region.own(sketch, False))
        region.units(dealt_units).add_(region.own_units(values, False))
        apart.append(region.split)
    assert torch.equal(total, seen)
    torch.testing.assert_close(units, seen.square().sum(-1))
    # Of a sum that all know, every part is taken by one rank.
    assert torch.equal(dealt, sketch)
    assert torch.equal(dealt_units, values)
    assert len(set(apart)) == 1, "ranks must agree on what they sum"


@pytest.mark.parametrize(
    ("view", "cut", "split"),
    [
        ("row", (0, 15), False),
        ("row", (10, 15), False),
        ("row", (0, 7), True),
        ("column", (0, 15), True),
        ("column", (0, 30), False),
        ("experts", (0, 20), False),
        ("experts, transposed", (0, 20), False),
        ("experts, transposed", (0, 5), True),
        ("vector", (0, 4), True),
    ],
)
def test_units_are_split_where_a_cut_goes_through_one(view, cut, split):
    assert {region.split for region, _, _ in pieces(VIEWS[view], cut)} == {split}


def test_a_range_of_whole_rows_is_not_copied():
    view = VIEWS["row"]
    _, piece, part = list(pieces(view, (0, 15)))[1]
    flat = torch.zeros(part.length)
    piece.view(flat).add_(1)
    assert flat.eq(1).all()
    assert piece.padding == (0, 0)


def test_parameters_on_one_rank_share_a_block_and_others_do_not():
    assert Cut(0, 10).owner(10) == Cut(4, 10).owner(6) == 0
    assert Cut(12, 10).owner(8) == 1
    assert Cut(5, 10).owner(6) is None
