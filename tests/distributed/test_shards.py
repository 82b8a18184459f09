"""A guard on parameters that `fully_shard` and `distribute_tensor` spread over processes."""

import functools
import re

import pytest
import torch

from tests.distributed import jobs
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

# Sums over ranks are taken in another order than one process takes them, and AdamW divides by the root of its
# second moment: over 25 steps of rate 0.02, 20 of them guarded, rounding grows to 2e-5.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def alone(**options):
    torch.set_num_threads(1)
    return jobs.run("whole", **options)


def assert_agrees(found, expected):
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, **TOLERANCE)
    assert found["foreign"] == expected["foreign"]
    assert found["counts"] == pytest.approx(expected["counts"])
    for name, tables in expected["places"].items():
        assert found["places"][name].keys() == tables.keys()
        for domain, table in tables.items():
            # Where a projection acts late, little is taken back and rounding decides how little.
            assert found["places"][name][domain] == pytest.approx(table, rel=2e-2, abs=1e-6), (name, domain)
    assert found["slopes"] == pytest.approx(expected["slopes"], rel=1e-2)
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


def assert_equal(a, b):
    for name, value in a["weights"].items():
        assert torch.equal(b["weights"][name], value), name
    assert a["metrics"] == b["metrics"]
    assert a["places"] == b["places"]
    assert a["foreign"] == b["foreign"]
    assert a["counts"] == b["counts"]
    for domain, masks in a["sets"].items():
        assert all(torch.equal(mask, b["sets"][domain][name]) for name, mask in masks.items())


CASES = {
    1: [("fsdp2", {})],
    2: [
        ("fsdp2", {}),
        # Pieces of unequal size: 8 and 7 of 15.
        ("fsdp2", {"hidden": 15}),
        ("fsdp2", {"coverage": 0.6}),
        ("fsdp2", {"coverage": 0.6, "selection": "edits"}),
        ("fsdp2", {"first_order": True}),
        ("fsdp2", {"projection_metric": "gradient"}),
        ("fsdp2", {"hidden": 15, "projection_metric": "gradient", "coverage": 0.6}),
        ("ignored", {}),
    ],
    # A vector of 5 over 4 ranks leaves the last one without any of it.
    4: [("fsdp2", {"hidden": 5}), ("hybrid", {}), ("hybrid", {"projection_metric": "gradient"})],
}


@pytest.mark.parametrize("world", CASES)
def test_ranks_equal_one_process(world, tmp_path):
    calls = [functools.partial(jobs.run, how, **options) for how, options in CASES[world]]
    results = run_ranks(world, jobs.several, calls, folder=tmp_path)
    for index, (_, options) in enumerate(CASES[world]):
        found = [result[index] for result in results]
        for other in found[1:]:
            assert_equal(found[0], other)
        expected = alone(**options)
        assert expected["metrics"]["guard/update_kept"] < 0.99, "the projection must have acted"
        if options.get("first_order"):
            # Weighed against the quadratic term by few measurements: rounding moves the split between them.
            for name in ("math", "code"):
                del expected["metrics"][f"guard/{name}/predicted"], found[0]["metrics"][f"guard/{name}/predicted"]
        assert_agrees(found[0], expected)


def test_an_evaluation_before_the_guard_changes_nothing(tmp_path):
    calls = [functools.partial(jobs.evaluated, "fsdp2", bind) for bind in (True, False)]
    for found in run_ranks(2, jobs.several, calls, folder=tmp_path):
        for outcome in found:
            assert_agrees(outcome, alone())


def test_files_of_two_moments_are_refused(tmp_path):
    # The last of them has the former file; the second one's is of the same moment as the first's.
    calls = [functools.partial(job, tmp_path / job.__name__) for job in (jobs.torn, jobs.attempts)]
    for torn, attempts in run_ranks(3, jobs.several, calls, folder=tmp_path):
        assert re.search(r"StateError: .* not those of all ranks at one moment: .* at steps \[3, 6\], .*", torn)
        # Before the first anchor, where nothing else than the gradients tells them apart.
        assert re.search(r"StateError: .* several attempts at step 3: energy of domain 'math' is \[", attempts)


def test_files_of_ranks_beyond_the_latest_save_are_passed_over(tmp_path):
    """Two ranks save, one goes on and saves into the same folder, two load that."""
    folder = tmp_path / "state"
    run_ranks(2, functools.partial(jobs.begun, "fsdp2", 3, folder), folder=tmp_path / "first")
    torch.set_num_threads(1)
    jobs.begun("whole", 9, folder)
    found = run_ranks(2, functools.partial(jobs.went_on, "fsdp2", 9, folder), folder=tmp_path / "last")
    assert_equal(*found)
    expected = alone()
    assert found[0]["foreign"] == expected["foreign"]
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"hidden": 15, "coverage": 0.6}])
def test_regions_move_alike(options, tmp_path):
    first, second = run_ranks(2, functools.partial(jobs.moved, "fsdp2", **options), folder=tmp_path)
    assert_equal(first, second)
    torch.set_num_threads(1)
    expected = jobs.moved("whole", **options)
    assert sum(value for name, value in expected["metrics"].items() if name.endswith("renewals")) > 0
    assert_agrees(first, expected)


def test_resume_is_exact(tmp_path):
    calls = [functools.partial(jobs.run, "fsdp2")]
    calls += [functools.partial(jobs.resumed, "fsdp2", at, tmp_path / f"state{at}") for at in (3, 9, 17)]
    for whole, *cuts in run_ranks(2, jobs.several, calls, folder=tmp_path):
        for cut in cuts:
            for name, value in whole["weights"].items():
                assert torch.equal(cut["weights"][name], value), name
            assert whole["counts"] == cut["counts"]


@pytest.mark.parametrize("options", [{}, {"coverage": 0.6, "first_order": True}])
def test_a_model_that_is_sharded_later_goes_on(options, tmp_path):
    calls = [functools.partial(jobs.taken_over, at, **options) for at in (3, 9, 17)]
    expected = alone(make=torch.optim.SGD, rate=0.5, **options)
    assert expected["metrics"]["guard/update_kept"] < 0.99, "the projection must have acted"
    for first, second in zip(*run_ranks(2, jobs.several, calls, folder=tmp_path), strict=True):
        assert_equal(first, second)
        for name, value in expected["weights"].items():
            torch.testing.assert_close(first["weights"][name], value, **TOLERANCE)
        assert first["foreign"] == expected["foreign"]
        assert first["counts"] == pytest.approx(expected["counts"])


# Before an anchor, with one protected domain, with two.
CUTS = [(at, {}) for at in (3, 9, 17)]
# One process stacks matrices that ranks keep apart, and the other way round.
CUTS += [(17, {"hidden": 15, "coverage": 0.6}), (9, {"first_order": True}), (3, {"selection": "edits"})]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_another_number_of_ranks_goes_on(before, after, tmp_path):
    """Numbers of ranks before and after; in one process the model is not sharded."""

    def on(world, job):
        torch.set_num_threads(1)
        how = "whole" if world == 1 else "fsdp2"
        calls = [
            functools.partial(job, how, at, tmp_path / f"state{index}", **options)
            for index, (at, options) in enumerate(CUTS)
        ]
        if world > 1:
            return run_ranks(world, jobs.several, calls, folder=tmp_path / job.__name__)
        return [[call() for call in calls]]

    on(before, jobs.begun)
    results = on(after, jobs.went_on)
    for index, (_, options) in enumerate(CUTS):
        found = [result[index] for result in results]
        for other in found[1:]:
            assert_equal(found[0], other)
        expected = alone(**options)
        if options.get("first_order"):
            for name in ("math", "code"):
                del expected["metrics"][f"guard/{name}/predicted"], found[0]["metrics"][f"guard/{name}/predicted"]
        for name in [name for name in expected["metrics"] if name.endswith(("reward", "length", "update_kept"))]:
            # Means since the last report, and this run begins with the state it read.
            expected["metrics"].pop(name), found[0]["metrics"].pop(name, None)
        assert_agrees(found[0], expected)


@pytest.mark.parametrize("metric", ["euclidean", "gradient"])
def test_a_step_makes_one_collective(metric, tmp_path):
    order = ["math"] * 3 + ["code"] * 3 + ["qa"] * 4
    for found in run_ranks(2, jobs.collectives, order, metric, folder=tmp_path):
        assert [protected for protected, _ in found] == [0] * 3 + [1] * 3 + [2] * 4
        for step, (_, calls) in enumerate(found):
            # Where the domain changes an anchor is set, which has collectives of its own.
            if step not in (3, 6):
                assert calls == ["c10d::allreduce_"], step


def test_all_ranks_count_the_same_gradients(tmp_path):
    kinds = {"nan": 2, "zero": 2, "zero here": 3}
    calls = [functools.partial(jobs.bad_gradients, kind) for kind in kinds]
    for found in run_ranks(2, jobs.several, calls, folder=tmp_path):
        for (counted, finite), expected in zip(found, kinds.values(), strict=True):
            assert counted == pytest.approx(expected, rel=0.05)
            assert finite


def test_an_idle_guard_is_invisible(tmp_path):
    assert run_ranks(2, jobs.idle_pair, folder=tmp_path) == [True, True]


REFUSALS = {
    2: {
        "grid": r"UnsupportedError: Parameter 'weight' is placed as .* Use fully_shard alone",
        "flat": r"UnsupportedError: The model is wrapped by FullyShardedDataParallel .* Use fully_shard",
        "reference": r"UnsupportedError: .* sharded over 1 ranks, and their engine takes .* Protect it before",
        "in place": r"HostError: The optimizer changed the gradients in place",
        "other rank": r"StateError: The guard's files are not .* ranks \[\(1, 2\)\] .* rank \[0\] is missing",
    },
    4: {"groups": r"UnsupportedError: Parameter '1.weight' is sharded over ranks"},
}


@pytest.mark.parametrize("world", REFUSALS)
def test_refusals_say_why(world, tmp_path):
    calls = [functools.partial(jobs.refusal, kind, str(tmp_path / "state")) for kind in REFUSALS[world]]
    found = run_ranks(world, jobs.several, calls, folder=tmp_path)[0]
    for message, pattern in zip(found, REFUSALS[world].values(), strict=True):
        assert re.match(pattern, message), message
