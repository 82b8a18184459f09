"""A guard on parameters that `fully_shard` and `distribute_tensor` spread over processes."""

import functools

import pytest
import torch

from tests.distributed import jobs
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

# Sums over ranks are taken in another order than one process takes them, and AdamW divides by the root of its
# second moment: over 25 steps of rate 0.02, 20 of them guarded, rounding grows to 2e-5.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@functools.cache
def alone(**options):
    torch.set_num_threads(1)
    return jobs.run("whole", **dict(options))


def assert_agrees(found, expected):
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, **TOLERANCE)
    assert found["foreign"] == expected["foreign"]
    assert found["counts"] == pytest.approx(expected["counts"])
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


def assert_equal(a, b):
    for name, value in a["weights"].items():
        assert torch.equal(b["weights"][name], value), name
    assert a["metrics"] == b["metrics"]
    assert a["foreign"] == b["foreign"]
    assert a["counts"] == b["counts"]
    for domain, masks in a["sets"].items():
        assert all(torch.equal(mask, b["sets"][domain][name]) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("world", "how", "options"),
    [
        (2, "fsdp2", {}),
        # Pieces of unequal size: 8 and 7 of 15.
        (2, "fsdp2", {"hidden": 15}),
        (2, "fsdp2", {"coverage": 0.6}),
        (2, "fsdp2", {"coverage": 0.6, "selection": "edits"}),
        (2, "fsdp2", {"first_order": True}),
        (1, "fsdp2", {}),
        (2, "replicate", {}),
        (2, "ignored", {}),
        # A vector of 5 over 4 ranks leaves the last one without any of it.
        (4, "fsdp2", {"hidden": 5}),
    ],
    ids=lambda value: str(value),
)
def test_ranks_equal_one_process(world, how, options, tmp_path):
    results = run_ranks(world, functools.partial(jobs.run, how, **options), folder=tmp_path)
    for other in results[1:]:
        assert_equal(results[0], other)
    expected = alone(**options)
    assert expected["metrics"]["guard/update_kept"] < 0.99, "the projection must have acted"
    assert_agrees(results[0], expected)


@pytest.mark.parametrize("at", [3, 9, 17])
def test_resume_is_exact(at, tmp_path):
    whole = run_ranks(2, jobs.run, "fsdp2", folder=tmp_path / "whole")
    cut = run_ranks(2, jobs.resumed, "fsdp2", at, tmp_path / "state", folder=tmp_path / "cut")
    for a, b in zip(whole, cut, strict=True):
        for name, value in a["weights"].items():
            assert torch.equal(b["weights"][name], value), name
        assert a["counts"] == b["counts"]


def test_a_step_makes_one_collective(tmp_path):
    order = ["math"] * 3 + ["code"] * 3 + ["qa"] * 4
    for found in run_ranks(2, jobs.collectives, order, folder=tmp_path):
        assert [count for anchored, _, count in found if not anchored] == [1] * 7
        assert [protected for anchored, protected, _ in found if not anchored] == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("kind", "count"), [("nan", 2), ("zero", 2), ("zero here", 3)])
def test_all_ranks_count_the_same_gradients(kind, count, tmp_path):
    for counted, finite in run_ranks(2, jobs.bad_gradients, kind, folder=tmp_path):
        assert counted == pytest.approx(count, rel=0.05)
        assert finite


def test_an_idle_guard_is_invisible(tmp_path):
    assert run_ranks(2, jobs.idle_pair, folder=tmp_path) == [True, True]


@pytest.mark.parametrize(
    ("world", "kind", "message"),
    [
        (2, "grid", r"UnsupportedError: Parameter 'weight' is placed as .* Use fully_shard alone"),
        (2, "in place", r"HostError: The optimizer changed the gradients in place"),
        (2, "other rank", r"StateError: .* is rank 1 of 2 of a sharded model, this is rank 0 of 2"),
        (4, "groups", r"UnsupportedError: Parameter '1.weight' is sharded over ranks"),
    ],
)
def test_refusals_say_why(world, kind, message, tmp_path):
    import re

    found = run_ranks(world, jobs.refusal, kind, str(tmp_path / "state"), folder=tmp_path)
    assert re.match(message, found[0]), found[0]
