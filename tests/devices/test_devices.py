"""The guard beside a model that is not on the CPU: nothing mixes devices, and the results are the CPU's."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from . import jobs

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch has devices written in Python since 2.9",
)

# An order of summation apart; the guard's decisions are the same.
CLOSE = {"rtol": 5e-3, "atol": 1e-3}
CORE = {
    "defaults": {},
    "first order": {"first_order": True},
    "gradient metric": {"projection_metric": "gradient"},
    "by edits": {"selection": "edits", "coverage": 0.6},
    "by energy": {"coverage": 0.6},
    "at random": {"selection": "random", "coverage": 0.6},
    "recovery": {"recovery": True, "budget": 0.002, "recovery_budget": 0.002},
    "renewal": {"rank": 2},
    "observed": {"project": False},
}
TRAINERS = ("grpo", "grpo_recovery", "grpo_resumed", "rloo_lora", "sft")


@pytest.fixture(scope="module")
def run():
    """Runs a job, on the pretended device or on the CPU, in a process for each."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as there, ProcessPoolExecutor(1, spawn) as here:

        def work(job, pretend, *arguments):
            return (there if pretend else here).submit(job, pretend, *arguments).result(timeout=300)

        yield work


def assert_same(found, expected):
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        # The excess is the small difference of a projection that ended a sweep sooner or later.
        if not name.endswith(("/seconds", "/excess")):
            assert found["metrics"][name] == pytest.approx(value, rel=0.05, abs=2e-5, nan_ok=True), name
    for name, value in expected.get("weights", {}).items():
        torch.testing.assert_close(found["weights"][name], value, **CLOSE)


def test_the_pretended_device_refuses_what_a_gpu_does(run):
    found = run(jobs.mixed, True)
    allowed = {"one number": "elsewhere:0", "index": "elsewhere:0", "copy": "elsewhere:0", "move": "cpu"}
    assert {name: said for name, said in found.items() if name in allowed} == allowed
    assert {said for name, said in found.items() if name not in allowed} == {"same device"}


@pytest.mark.parametrize("rows_there", [True, False], ids=["rows there", "rows on the CPU"])
@pytest.mark.parametrize("case", CORE)
def test_a_guard_computes_where_the_model_is(case, rows_there, run):
    found, expected = (run(jobs.core, pretend, CORE[case], rows_there) for pretend in (True, False))
    assert (found["device"], expected["device"]) == ("elsewhere:0", "cpu")
    assert found["acted"] == expected["acted"]
    assert found["acted"]["projection"] == (case != "observed")
    assert found["acted"]["recovery"] == (case == "recovery")
    assert found["acted"]["renewal"] == (case == "renewal")
    assert_same(found, expected)


def test_bf16_weights_are_rounded_where_they_are(run):
    found, expected = (run(jobs.core, pretend, {}, True, torch.bfloat16) for pretend in (True, False))
    assert found["device"] == "elsewhere:0"
    assert found["acted"]["projection"]
    assert found["rates"] == pytest.approx(expected["rates"], abs=0.1)


def test_a_guard_follows_a_model_that_is_moved(run):
    found, expected = (run(jobs.core, pretend, {}, True, torch.float32, True) for pretend in (True, False))
    assert found["device"] == "elsewhere:0"
    assert_same(found, expected)


def test_a_state_goes_on_on_either_device(run):
    expected = run(jobs.saved, False)[0]
    there, here = run(jobs.saved, True)
    assert (there["device"], here["device"]) == ("elsewhere:0", "cpu")
    assert_same(there, expected)
    assert_same(here, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_real_trainers_on_the_pretended_device(kind, run):
    found, expected = (run(jobs.trainer, pretend, kind) for pretend in (True, False))
    assert (found["device"], found["model"]) == ("elsewhere:0", "elsewhere:0")
    assert (expected["device"], expected["model"]) == ("cpu", "cpu")
    assert found["steps"] == expected["steps"] == 8
    assert {"guard/math/measured", "guard/math/radius"} <= found["metrics"].keys()
    assert_same(found, expected)
