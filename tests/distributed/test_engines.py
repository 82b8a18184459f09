"""The guard inside a real trainer on two processes: DDP, FSDP2 and ZeRO give the same weights."""

import functools

import pytest
import torch

from tests.distributed import engines
from tests.distributed.ranks import run_ranks
from tests.trl.host import model_and_words

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def equal_to_ddp(found, ddp, rtol, atol, rel, foreign=20):
    """After 20 guarded steps: weights within `rtol` and `atol`, what the guard knows within `rel`."""
    assert found["foreign"] == foreign
    assert found["kept"] < 0.99, "the projection must have acted"
    for name, value in ddp["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=rtol, atol=atol)
    for name in ("radius", "subspace", "loss"):
        assert found[name] == pytest.approx(ddp[name], rel=rel), name


def test_fsdp2_equals_ddp_after_twenty_guarded_steps(tmp_path):
    model_and_words(tmp_path / "model")
    found = {}
    for how in ("ddp", "fsdp2"):
        call = functools.partial(engines.supervised_run, how, tmp_path)
        found[how], other = run_ranks(2, call, folder=tmp_path / f"ranks_{how}")
        for name, value in found[how]["weights"].items():
            assert torch.equal(other["weights"][name], value), name
        for name in ("radius", "subspace", "loss", "foreign"):
            assert found[how][name] == other[name], name
    ddp, fsdp2 = found["ddp"], found["fsdp2"]
    assert (ddp["kind"], fsdp2["kind"]) == ("Parameter", "DTensor")
    # AdamW at 3e-3; the two engines add gradients up in another order.
    equal_to_ddp(fsdp2, ddp, rtol=1e-3, atol=1e-4, rel=1e-2)


RECOVERING = {
    "recovery": True,
    "recovery_budget": 1e-6,
    "recovery_tolerance": 1e-7,
    "recovery_steps": 2,
    "recovery_cooldown": 1,
    "recovery_share": 0.4,
}


MOVING = {"moving": True}


def alike(a, b, *names):
    """The same weights, bit by bit, and the same of what is named."""
    for name, value in a["weights"].items():
        assert torch.equal(b["weights"][name], value), name
    for name in names:
        assert repr(a[name]) == repr(b[name]), name


@pytest.mark.parametrize("settings", [{}, RECOVERING, MOVING], ids=["projecting", "recovering", "moving"])
def test_grpo_on_two_ranks_decides_alike_and_resumes_exactly(tmp_path, settings):
    model_and_words(tmp_path / "model")

    def run(name, label, **how):
        call = functools.partial(engines.rollouts_run, tmp_path, name, **how, **settings)
        return run_ranks(2, call, folder=tmp_path / f"ranks_{label}")

    first, second = run("whole", "whole")
    assert "MULTI_CPU" in first["engine"]
    assert first["kept"] < 0.999, "the projection must have acted"
    assert first["retained"] == second["retained"]
    alike(first, second, "taken", "radii", "losses", "schedule", "renewals")
    if settings is MOVING:
        assert first["renewals"]["math"] > 0
    if settings is RECOVERING:
        assert first["schedule"]["phases"] > 0
        planned = [("math",)] * 5 + [("code",)] * 7
        assert first["taken"] != planned, "a recovery must have taken a planned step"
    run("parts", "stopped", stop=8)
    for whole, resumed in zip((first, second), run("parts", "resumed", resume=True), strict=True):
        alike(whole, resumed, "radii", "losses", "schedule", "renewals")
        assert resumed["taken"] == whole["taken"][8:]


# By name: settings of the run, and the step it is stopped after. With two iterations a generation serves two
# steps, and a stop lies between generations: TRL's checkpoints hold no rollouts.
UNDER_ZERO = {
    "2 recovering": ({"stage": 2, **RECOVERING}, 8),
    "2 with two iterations": ({"stage": 2, "steps": 16, "iterations": 2}, 14),
    "3 accumulating": ({"stage": 3, "steps": 7}, 5),
    "3 with two iterations": ({"stage": 3, "steps": 12, "iterations": 2}, 8),
    "2 in bf16": ({"stage": 2, "bf16": True}, 8),
    "3 in bf16": ({"stage": 3, "bf16": True, "steps": 7}, 5),
}


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """What two ranks found under DDP and DeepSpeed, by run: they are started once."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    model_and_words(folder / "model")
    # DDP first: DeepSpeed leaves its mark in the environment.
    calls = {}
    for how in ("ddp", "zero2", "zero3"):
        run = functools.partial(engines.supervised_run, how, folder)
        calls[how] = run
        # The state is read before the trainer hands its model to the engine.
        calls[f"{how} next"] = functools.partial(run, steps=8, blocks=[("code", 32)], before=folder / f"{how}_25")
    for name, (settings, stop) in UNDER_ZERO.items():
        run = functools.partial(engines.rollouts_run, folder, **settings)
        calls[f"whole {name}"] = functools.partial(run, f"whole {name}")
        calls[f"stopped {name}"] = functools.partial(run, f"parts {name}", stop=stop)
        calls[f"resumed {name}"] = functools.partial(run, f"parts {name}", resume=True)
    results = run_ranks(2, engines.in_turn, list(calls.values()), folder=folder / "ranks")
    return {name: [result[index] for result in results] for index, name in enumerate(calls)}


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_ddp_after_twenty_guarded_steps(zero, stage):
    ddp, (found, other) = zero["ddp"][0], zero[f"zero{stage}"]
    alike(found, other, "radius", "subspace", "loss", "foreign")
    assert "DEEPSPEED" in found["engine"]
    assert found["away"] == (stage == 3), "stage 3 must have shared the weights out before the guard was built"
    equal_to_ddp(found, ddp, rtol=1e-4, atol=1e-5, rel=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_next_trainer_under_zero_goes_on_from_the_state_like_ddp(zero, stage):
    ddp, (found, other) = zero["ddp next"][0], zero[f"zero{stage} next"]
    assert ddp["steps"] == found["steps"] == 25 + 8
    alike(found, other, "radius", "subspace", "loss", "foreign")
    equal_to_ddp(found, ddp, rtol=1e-4, atol=1e-5, rel=1e-3, foreign=20 + 8)


@pytest.mark.parametrize("name", UNDER_ZERO)
def test_grpo_under_zero_decides_alike_and_resumes_exactly(zero, name):
    settings, stop = UNDER_ZERO[name]
    first, second = zero[f"whole {name}"]
    assert "DEEPSPEED" in first["engine"]
    assert first["kept"] < 0.999, "the projection must have acted"
    alike(first, second, "taken", "radii", "losses", "schedule")
    assert first["dtype"] == ("torch.bfloat16" if "bf16" in settings else "torch.float32")
    assert first["apart"] == 0, "the model must compute with the fp32 weights, rounded"
    if "recovery" in settings:
        assert first["schedule"]["phases"] > 0
    if settings["stage"] == 3 and "iterations" not in settings:
        # One prompt of each domain, in the two micro-batches of a step.
        assert ("code", "math") in first["taken"]
    if "iterations" in settings:
        assert first["taken"][::2] == first["taken"][1::2], "both steps of a generation train its domain"
    for stopped in zero[f"stopped {name}"]:
        assert len(stopped["taken"]) == stop
        assert stopped["protected"]["math"] > 0, "a domain must be protected where the run goes on"
    for whole, resumed in zip((first, second), zero[f"resumed {name}"], strict=True):
        alike(whole, resumed, "radii", "losses", "schedule", "protected")
        assert resumed["taken"] == whole["taken"][stop:]
