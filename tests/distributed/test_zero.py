"""A guard on what DeepSpeed's ZeRO spreads over processes."""

import functools
import importlib.util
import re

import pytest
import torch

from tests.distributed import jobs
from tests.distributed.ranks import run_ranks
from tests.distributed.test_shards import alone, assert_agrees, assert_equal

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

# Rows of 15 or 5 elements: ranks are cut in the middle of rows, and some hold nothing of a parameter.
CASES = {
    "stage 1": (1, {"hidden": 15}),
    "stage 2, two groups": (2, {"hidden": 15, "groups": True}),
    "stage 2, small": (2, {"hidden": 5, "changes": {"coverage": 0.6, "selection": "edits"}}),
    "stage 2, in turn": (2, {"hidden": 15, "zero": {"round_robin_gradients": True}}),
    "stage 2, first order": (2, {"hidden": 15, "changes": {"first_order": True}}),
    "stage 2, gradient metric": (2, {"hidden": 15, "changes": {"projection_metric": "gradient"}}),
    "stage 3": (3, {"groups": True}),
    "stage 3, groups of one": (3, {"groups": "embeddings"}),
    "stage 3, gradient metric": (3, {"hidden": 5, "changes": {"projection_metric": "gradient"}}),
    "stage 3, uneven": (3, {"hidden": 15, "changes": {"coverage": 0.6}}),
    "stage 3, sub-groups": (
        3,
        {"hidden": 5, "zero": {"sub_group_size": 50, "stage3_param_persistence_threshold": 0}},
    ),
}
# Before an anchor, with one protected domain, with two.
RESUMED = {"stage 1": 9, "stage 2, two groups": 3, "stage 3, uneven": 17}
BF16 = {
    "stage 1, fp32 sums": (1, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "stage 2": (2, {"groups": True}),
    "stage 3": (3, {"groups": True}),
}
REFUSALS = {
    "offload": r"UnsupportedError: DeepSpeed keeps optimizer states and weights on \['cpu', 'none'\].* Take both",
    "offload by its former name": r"UnsupportedError: DeepSpeed runs with cpu_offload=True: .* Take it out",
    "deepcompile": r"UnsupportedError: DeepSpeed runs with DeepCompile.* Take compile.deepcompile out",
    "stage 0": r"UnsupportedError: DeepSpeed runs with ZeRO stage 0.* Set zero_optimization.stage to 1, 2 or 3",
    "muon": r"UnsupportedError: DeepSpeed's Muon puts its updates in place of the gradients .* Use AdamW",
    "module": r"HostError: The optimizer is DeepSpeed's .* Build it on what deepspeed.initialize returned",
    "before the engine": r"HostError: Parameter 'embed.weight' belongs to a DeepSpeed engine.*Guard\(engine\)",
    "frozen late": r"HostError: Parameter 'extra.weight' is trainable, but DeepSpeed's optimizer does not",
    "in place": r"HostError: The optimizer changed the gradients in place",
    "elsewhere": r"UnsupportedError: DeepSpeed's fp32 weights of 'embed.weight' are not where",
}
# Without moments a host need not know how they are cut.
STARTED = {2: 9, 3: 17}
SGD = {"hidden": 15, "make": torch.optim.SGD, "rate": 0.3}
PHASES = ["math"] * 3 + ["code"] * 3 + ["qa"] * 4


@pytest.mark.parametrize("stage", [2, 3])
def test_one_process_saves_and_reads_its_state(stage, tmp_path):
    from tests.distributed import zero_jobs

    assert run_ranks(1, zero_jobs.saved_and_read, stage, tmp_path / "state", folder=tmp_path / "one") == [True]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two ranks found, by job: they are started once, which takes longer than any of the jobs."""
    from tests.distributed import zero_jobs

    folder = tmp_path_factory.mktemp("two")
    torch.set_num_threads(1)
    calls = {name: functools.partial(zero_jobs.run, stage, **how) for name, (stage, how) in CASES.items()}
    for name, (stage, how) in BF16.items():
        calls["bf16 " + name] = functools.partial(zero_jobs.followed, stage, bf16={"enabled": True}, **how)
    for stage in (2, 3):
        calls[f"idle {stage}"] = functools.partial(zero_jobs.idle_pair, stage)
        calls[f"collectives {stage}"] = functools.partial(zero_jobs.collectives, stage, PHASES, groups=True)
    for name, at in RESUMED.items():
        stage, how = CASES[name]
        calls["resumed " + name] = functools.partial(zero_jobs.resumed, stage, at, folder / name, **how)
    for stage, at in STARTED.items():
        calls[f"begun {stage}"] = functools.partial(zero_jobs.begun, stage, at, folder / f"two{stage}", **SGD)
        with zero_jobs.unstacked():
            jobs.begun("whole", at, folder / f"one{stage}", **SGD)
        calls[f"went on {stage}"] = functools.partial(zero_jobs.went_on, stage, at, folder / f"one{stage}", **SGD)
    calls["skipped"] = zero_jobs.skipped
    calls |= {kind: functools.partial(zero_jobs.refusal, kind) for kind in REFUSALS}
    results = run_ranks(2, jobs.several, list(calls.values()), folder=folder / "ranks")
    by_job = {name: [result[index] for result in results] for index, name in enumerate(calls)}
    return by_job | {"folder": folder}


def expected_of(how):
    """What one process finds without DeepSpeed."""
    options = {"hidden": how.get("hidden", 16), **how.get("changes", {})}
    expected = alone(**options)
    assert expected["metrics"]["guard/update_kept"] < 0.99, "the projection must have acted"
    return expected


def check(ranks, how):
    for other in ranks[1:]:
        assert_equal(ranks[0], other)
    expected = expected_of(how)
    if "first_order" in how.get("changes", {}):
        for name in ("math", "code"):
            # As for `fully_shard`: rounding moves the split of a sum of two terms.
            del expected["metrics"][f"guard/{name}/predicted"], ranks[0]["metrics"][f"guard/{name}/predicted"]
    assert_agrees(ranks[0], expected)
    assert ranks[0]["apart"] == 0, "the model computes with other weights than the optimizer holds"


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(found, name):
    check(found[name], CASES[name][1])


@pytest.mark.parametrize("stage", STARTED)
def test_another_number_of_ranks_goes_on(found, stage):
    from tests.distributed.zero_jobs import unstacked

    with unstacked():
        expected = alone(**SGD)
        one = jobs.went_on("whole", STARTED[stage], found["folder"] / f"two{stage}", **SGD)
    assert expected["metrics"]["guard/update_kept"] < 0.99, "the projection must have acted"
    for ranks in ([one], found[f"went on {stage}"]):
        for other in ranks[1:]:
            assert_equal(ranks[0], other)
        table = {**expected, "metrics": dict(expected["metrics"])}
        for name in [name for name in table["metrics"] if name.endswith(("reward", "length", "update_kept"))]:
            # Means since the last report, and this run begins with the state it read.
            table["metrics"].pop(name), ranks[0]["metrics"].pop(name, None)
        assert_agrees(ranks[0], table)


@pytest.mark.parametrize("name", BF16)
def test_bf16_weights_follow_the_projected_fp32_ones(found, name):
    first, second = found["bf16 " + name]
    assert_equal(first, second)
    assert first["foreign"] == {"math": 20, "code": 12, "qa": 0}
    assert first["metrics"]["guard/update_kept"] < 0.99, "the projection must have acted"
    assert first["apart"] == 0, "weights of a step before"
    # Two domains at the end: the promise for several is 5 percent.
    assert len(first["excess"]) == 32
    assert max(first["excess"]) < 1.05


@pytest.mark.parametrize("stage", [2, 3])
def test_an_idle_guard_is_invisible(found, stage):
    assert found[f"idle {stage}"] == [True, True]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_makes_one_collective(found, stage):
    for steps in found[f"collectives {stage}"]:
        assert [protected for protected, _ in steps] == [0] * 3 + [1] * 3 + [2] * 4
        for step, (_, calls) in enumerate(steps):
            # Where the domain changes an anchor is set, which has collectives of its own.
            if step not in (3, 6):
                assert calls == ["c10d::allreduce_"], step


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact(found, name):
    for whole, cut in zip(found[name], found["resumed " + name], strict=True):
        for parameter, value in whole["weights"].items():
            assert torch.equal(cut["weights"][parameter], value), parameter
        assert whole["counts"] == cut["counts"]


def test_a_step_that_deepspeed_leaves_out_is_not_counted(found):
    assert found["skipped"] == [[(1, 1), (1, 1), (2, 2)]] * 2


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals_say_why(found, kind):
    assert re.match(REFUSALS[kind], found[kind][0]), found[kind][0]
