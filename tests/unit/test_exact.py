"""The guard's own products under what a host has switched on for its own."""

import contextlib

import pytest
import torch

from interference_guard.exact import exact_products
from tests.unit.helpers import guarded, policy_gradient, rollout, train

MATMUL = torch.backends.mkldnn.matmul if hasattr(torch.backends.mkldnn, "matmul") else None
needs_words = pytest.mark.skipif(MATMUL is None, reason="this torch has no precision setting for the CPU")


@pytest.fixture
def reduced():
    """Products of fp32 in reduced precision, as hosts ask for it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@needs_words
def test_precision_and_autocast_are_off_inside_and_as_before_outside(reduced):
    a = torch.eye(3)
    inside = MATMUL.fp32_precision
    assert inside != "ieee"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_products(a.device):
            assert MATMUL.fp32_precision == "ieee"
            assert (a @ a).dtype == torch.float32
        with contextlib.suppress(ZeroDivisionError), exact_products(a.device):
            raise ZeroDivisionError
        assert (a @ a).dtype == torch.bfloat16
    assert MATMUL.fp32_precision == inside
    assert torch.get_float32_matmul_precision() == "medium"


@needs_words
def test_a_precision_that_follows_the_general_one_goes_on_to_follow_it():
    before, own = torch.backends.fp32_precision, MATMUL.fp32_precision
    try:
        MATMUL.fp32_precision = "none"
        torch.backends.fp32_precision = "bf16"
        with exact_products(torch.device("cpu")):
            assert MATMUL.fp32_precision == "ieee"
        assert MATMUL.fp32_precision == "bf16"
        torch.backends.fp32_precision = "ieee"
        assert MATMUL.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before
        MATMUL.fp32_precision = own


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has flags for CUDA alone"
)
@pytest.mark.parametrize("where", [torch.backends, torch.backends.cudnn, torch.backends.cuda.matmul])
def test_words_of_cuda_are_asked_for_no_flag(where):
    """Torch raises where a flag is read that words have set, as transformers' `tf32=True` does."""
    products, device = torch.backends.cuda.matmul, torch.device("cuda")
    before, own = where.fp32_precision, products.fp32_precision
    try:
        products.fp32_precision = "none"
        where.fp32_precision = "tf32"
        with exact_products(device):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "tf32"
        where.fp32_precision = "ieee"
        assert products.fp32_precision == "ieee"
    finally:
        where.fp32_precision = before
        products.fp32_precision = own


def test_a_step_inside_autocast_is_that_of_one_outside():
    ends = []
    for inside in (False, True):
        model, guard, optimizer = guarded()
        train(model, guard, optimizer, ["math"] * 4)
        for step in range(4):
            with guard.domain("code"):
                policy_gradient(model, rollout(model, "code", seed=step)).backward()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                    optimizer.step()
                optimizer.zero_grad()
        assert guard.domains["math"].foreign_steps == 4
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@needs_words
def test_the_guard_computes_exactly_and_the_policy_as_the_host_says(reduced):
    model, guard, optimizer = guarded()
    own, host = [], []
    scores = guard.policy
    weights = guard.view.weights

    def policy(rows):
        host.append(MATMUL.fp32_precision)
        return scores(rows)

    def read():
        own.append(MATMUL.fp32_precision)
        return weights()

    guard.policy, guard.view.weights = policy, read
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 3)
    guard.metrics()
    assert host
    assert "ieee" not in host
    assert set(own) == {"ieee"}
