import dataclasses

import pytest
import torch

from interference_guard.protected import ProtectedSet, random_units, select_units
from interference_guard.units import UnitLayout
from tests.unit.helpers import CONFIG, guarded, train


@pytest.fixture
def layout():
    shapes = {
        "layers.0.mlp.gate_proj.weight": (4, 3),
        "layers.0.mlp.up_proj.weight": (4, 3),
        "layers.0.mlp.down_proj.weight": (3, 4),
        "layers.0.self_attn.q_proj.weight": (5, 3),
        "norm.weight": (3,),
    }
    return UnitLayout((name, torch.zeros(shape)) for name, shape in shapes.items())


def scores(layout, **given):
    table = {name: torch.zeros(view.units) for name, view in layout.views.items()}
    for key, values in given.items():
        name = next(name for name in table if key in name)
        table[name] = torch.tensor(values)
    return table


def test_a_neuron_is_gate_row_up_row_and_down_column(layout):
    # Channel 2 carries 6 in three parts, each smaller than q row 0.
    table = scores(layout, gate=[0.0, 0, 2, 0], up=[0.0, 0, 2, 0], down=[0.0, 0, 2, 0], q_proj=[5.0, 0, 0, 0, 0])
    chosen = select_units(table, layout.views, 0.5)
    for name in table:
        expected = [False, False, True, False] if "mlp" in name else [False] * len(table[name])
        assert chosen.masks[name].tolist() == expected


def test_the_smallest_set_that_covers(layout):
    table = scores(layout, q_proj=[5.0, 3.0, 1.0, 1.0, 0.0])
    for coverage, count in ((0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.85, 3), (0.99, 4)):
        chosen = select_units(table, layout.views, coverage)
        assert int(sum(mask.sum() for mask in chosen.masks.values())) == count
    assert select_units(table, layout.views, 1.0).share == 1.0


def test_random_units_are_as_many_and_drawn_from_the_generator(layout):
    table = scores(layout, q_proj=[5.0, 3.0, 1.0, 1.0, 0.0], norm=[2.0])
    like = select_units(table, layout.views, 0.8)
    draws = [random_units(like, table, layout.views, torch.Generator().manual_seed(seed)) for seed in range(8)]
    again = random_units(like, table, layout.views, torch.Generator().manual_seed(3))
    assert again.overlap(draws[3]) == 1.0
    assert len({tuple(torch.cat(list(draw.masks.values())).tolist()) for draw in draws}) > 1
    for draw in draws:
        mlp = [draw.masks[name] for name in table if "mlp" in name]
        assert all(torch.equal(mask, mlp[0]) for mask in mlp)


def test_overlap_is_the_jaccard_index():
    a = ProtectedSet({"x": torch.tensor([True, True, False, False])})
    b = ProtectedSet({"x": torch.tensor([False, True, True, False])})
    assert a.overlap(b) == pytest.approx(1 / 3)
    assert a.share == 0.5


def test_random_sets_of_two_domains_are_two_draws():
    config = dataclasses.replace(CONFIG, coverage=0.9, selection="random")
    model, guard, optimizer = guarded(config=config)
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 3 + ["math"])
    a, b = (guard.domains[name].protected_set for name in ("math", "code"))
    # Of one draw the smaller set would be a part of the larger one.
    contained = min(a.share, b.share) / max(a.share, b.share)
    assert 0 < a.overlap(b) < 0.8 * contained
