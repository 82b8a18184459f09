"""Parts of one number of ranks for another; several ranks are in tests/distributed/test_shards.py."""

import json
import shutil

import pytest
import torch
from torch import nn

from interference_guard import Guard, GuardedOptimizer, StateError
from interference_guard.checkpoint import DETAILS
from interference_guard.recut import recut
from tests.unit.helpers import CONFIG, Toy, rollout


def test_one_part_for_one_rank_is_itself(trained):
    model, guard, folder = trained
    other = Guard(model, CONFIG)
    other.load(folder, ranks=[folder])
    expected, found = guard.state_dict(), other.state_dict()
    assert json.dumps(found["details"]) == json.dumps(expected["details"])
    # What one process shares with the sums is stored once more.
    shared = {key for key in found["tensors"] if key.endswith(("/U", "/energy")) and "/model/" in key}
    assert found["tensors"].keys() - shared == expected["tensors"].keys() - shared
    for key in expected["tensors"].keys() - shared:
        assert torch.equal(found["tensors"][key], expected["tensors"][key]), key
    assert other.raw("math") == guard.raw("math")


def changed(folder, name, change):
    target = folder.parent / name
    shutil.copytree(folder, target)
    details = json.loads((target / DETAILS).read_text())
    change(details)
    (target / DETAILS).write_text(json.dumps(details))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda details: details.pop("blocks"), "incomplete: KeyError: 'blocks'"),
        (
            lambda details: details.update(shards=[1, 2]),
            r"ranks \[\(1, 2\)\] at steps \[6\], rank \[0\] is missing",
        ),
        (lambda details: details["domains"]["math"].pop("recent"), "incomplete: KeyError: 'recent'"),
        (lambda details: details.update(blocks=[]), "incomplete: ValueError: its blocks are not those of its"),
        (lambda details: details.update(cuts=[]), "incomplete: AttributeError"),
    ],
)
def test_parts_that_do_not_fit_are_refused_and_change_nothing(trained, change, message):
    _, guard, folder = trained
    before = guard.raw("math")
    with pytest.raises(StateError, match=message):
        guard.load(folder, ranks=[changed(folder, "other", change)])
    assert guard.raw("math") == before


def test_parts_whose_tensors_do_not_fit_are_refused_and_change_nothing(trained):
    """Each says that it is half of the model, and holds all of it."""
    _, guard, folder = trained
    before, cuts = guard.raw("math"), {"embed.weight": 0, "lm_head.weight": 0}
    halves = [
        changed(folder, f"half{rank}", lambda details, rank=rank: details.update(shards=[rank, 2], cuts=cuts))
        for rank in range(2)
    ]
    with pytest.raises(StateError, match=r"incomplete: RuntimeError: .*size"):
        guard.load(folder, ranks=halves)
    assert guard.raw("math") == before


def test_a_part_without_an_anchor_is_refused(trained):
    _, guard, _ = trained
    packed = guard.state_dict()
    packed["tensors"] = {key: value for key, value in packed["tensors"].items() if not key.endswith("/z0")}
    with pytest.raises(StateError, match="incomplete: KeyError: 'model/0/z0'"):
        recut(guard, [(packed["details"], packed["tensors"])], (0, 1))


def test_parts_that_stack_parameters_in_other_ways_are_refused(trained):
    _, guard, folder = trained
    halves = [changed(folder, f"half{rank}", lambda details, rank=rank: half(details, rank)) for rank in range(2)]
    with pytest.raises(StateError, match="incomplete: ValueError: its ranks stack parameters in different ways"):
        guard.load(folder, ranks=halves)


def half(details, rank):
    details["shards"] = [rank, 2]
    if rank:
        details["blocks"].reverse()


def test_parts_of_two_moments_are_refused(trained):
    _, guard, folder = trained
    later = changed(folder, "later", lambda details: details.update(steps=7))
    with pytest.raises(StateError, match=r"at steps \[6, 7\]"):
        guard.load(folder, ranks=[folder, later])


def test_parts_of_two_attempts_at_one_step_are_refused(trained):
    _, guard, folder = trained
    first, second = (
        changed(folder, name, lambda details, name=name: details.update(save_id=name)) for name in ("a", "b")
    )
    guard.load(first, ranks=[first])
    # One of before there were such numbers is of another moment, too.
    for other in (second, folder):
        with pytest.raises(StateError, match=r"at steps \[6\] of 2 attempts"):
            guard.load(first, ranks=[first, other])


def test_without_any_part_the_file_is_named(trained, tmp_path):
    _, guard, _ = trained
    with pytest.raises(StateError, match=r"interference_guard\.json does not exist"):
        guard.load(tmp_path / "none", ranks=[])


def named(order, low=""):
    """Equal layers in some order, those named in `low` in bf16."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(6, 6, bias=False) for name in "abc"}
    for name in low:
        layers[name].to(torch.bfloat16)
    return nn.ModuleDict({name: layers[name] for name in order})


def trained_named(order, low=""):
    model = named(order, low)
    guard = Guard(model, CONFIG)
    optimizer = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), guard)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for domain in "xxyy":
        with guard.domain(domain):
            # Each layer has a size of its own to know it by.
            sizes = {name: 10.0**-place for place, name in enumerate("abc")}
            sum(
                s * model[n](x.to(model[n].weight.dtype)).float().square().sum() for n, s in sizes.items()
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, guard


def energies(guard):
    sums = guard.domains["x"].curvature.sums
    return {
        view.name: part.flatten().tolist()
        for block, item in zip(guard.view.blocks, sums, strict=True)
        for view, part in zip(block.views, item.energy.chunk(len(block.views)), strict=True)
    }


@pytest.mark.filterwarnings("ignore:No completions of domain")
@pytest.mark.parametrize(
    ("order", "low", "other"),
    [("abc", "", ("cba", "")), ("abc", "b", ("abc", "c")), ("abc", "", ("bac", "b"))],
    ids=["order", "formats", "fewer formats"],
)
def test_parameters_that_are_stacked_in_another_way_are_found_by_name(tmp_path, order, low, other):
    model, guard = trained_named(order, low)
    guard.save(tmp_path)
    again = named(*other)
    with torch.no_grad():
        for name in "abc":
            again[name].weight.copy_(model[name].weight)
    read, given = Guard(again, CONFIG), Guard(again, CONFIG)
    read.load(tmp_path)
    given.load_state_dict(guard.state_dict())
    for found in (read, given):
        assert energies(found) == energies(guard)
        # Formats differ by their rounding.
        torch.testing.assert_close(
            found.raw("x"), guard.raw("x"), rtol=1e-5 if low == other[1] else 0.1, atol=0.0
        )
    assert read.state_dict()["details"]["blocks"] != guard.state_dict()["details"]["blocks"]


def test_blocks_of_other_parameters_are_refused_and_change_nothing(trained):
    _, guard, folder = trained
    before = guard.raw("math")
    target = changed(folder, "other", lambda details: details["blocks"][0].pop())
    with pytest.raises(StateError, match="incomplete: ValueError: its blocks are not those of its parameters"):
        guard.load(target)
    assert guard.raw("math") == before


def test_a_part_in_another_order_names_the_first_difference(trained, monkeypatch):
    _, guard, _ = trained
    # One rank's part of a sharded model cannot be put in order by itself.
    monkeypatch.setattr(type(guard.view.shards), "sharded", True)
    state = guard.state_dict()
    state["details"]["blocks"] = state["details"]["blocks"][::-1]
    with pytest.raises(
        StateError, match=r"its block 0 is of \[.*\], this guard's of \['embed\.weight'.* Guard\.load"
    ):
        guard.load_state_dict(state)


@pytest.mark.parametrize("ranks", [1, 3])
def test_all_ranks_have_the_same_rows_of_a_reference_domain(tmp_path, ranks):
    model, given = Toy(), rollout(Toy(), "qa")
    for rank in range(2):
        guard = Guard(model, CONFIG)
        guard.protect("qa", given)
        guard.save(tmp_path / str(rank), folders=2, place=(rank, 2))
    read = Guard(model, CONFIG)
    read.load(tmp_path / "0", ranks=[tmp_path / "0", tmp_path / "1"], place=(ranks - 1, ranks))
    found, expected = read.domains["qa"], guard.domains["qa"]
    assert torch.equal(found.retained.input_ids, expected.retained.input_ids)
    assert torch.equal(found.anchor_scores, expected.anchor_scores)
