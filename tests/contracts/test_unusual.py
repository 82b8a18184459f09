"""Steps that are none, and gradients that are still scaled."""

import copy
import dataclasses

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from interference_guard import Guard, GuardedOptimizer, MissingDomainError, attach
from tests.contracts.test_optimizers import CONFIG, OPTIMIZERS, batch, model, run, same, weights

pytestmark = pytest.mark.filterwarnings("ignore:No completions of domain")


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw_fused"])
def test_grad_scaler_skips_leave_the_guard_out(name, wrapped, clipped):
    net = model()
    guard = Guard(net, CONFIG)
    optimizer = OPTIMIZERS[name](list(net.parameters()), 1e-2)
    if wrapped:
        optimizer = GuardedOptimizer(optimizer, guard)
    else:
        attach(optimizer, guard)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        x, y = batch(step)
        with guard.domain("a"):
            scaler.scale((net(x) - y).square().mean()).backward()
            if step == 1:
                net[0].weight.grad[0, 0] = float("inf")
            if clipped:
                scaler.unscale_(optimizer)
            before = weights(net)
            scaler.step(optimizer)
            scaler.update()
        assert same(before, weights(net)) == (step == 1)
        optimizer.zero_grad()
    assert guard.steps == 3
    assert guard.domains["a"].own_steps == 3
    # Curvature must be of unscaled gradients.
    twin, guard2 = model(), None
    guard2 = Guard(twin, CONFIG)
    inner = GuardedOptimizer(OPTIMIZERS[name](list(twin.parameters()), 1e-2), guard2)
    run(twin, inner, guard2, ["a"])
    run(twin, inner, guard2, ["a"] * 2, start=2)
    for mine, theirs in zip(guard.domains["a"].curvature.sums, guard2.domains["a"].curvature.sums, strict=True):
        torch.testing.assert_close(mine.energy, theirs.energy, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_idle_guard_leaves_a_fused_scaled_step_as_it_is(dtype, enabled):
    ends = []
    for watched in (False, True):
        net = model().to(dtype)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
        guard = Guard(net, dataclasses.replace(CONFIG, enabled=enabled))
        if watched:
            attach(optimizer, guard)
        scaler = torch.amp.GradScaler("cpu", init_scale=3 * 2.0**14)
        for step in range(4):
            # In fp16 these gradients are there only while they are scaled.
            x, y = (tensor.to(dtype) for tensor in batch(step))
            with guard.domain("a"):
                scaler.scale((1e-4 * (net(x) - y)).square().mean().float()).backward()
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(weights(net))
    assert same(*ends)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw_fused"])
def test_torch_may_set_up_the_state_of_a_guarded_optimizer(name):
    net = model()
    guard = Guard(net, CONFIG)
    optimizer = GuardedOptimizer(OPTIMIZERS[name](list(net.parameters()), 1e-2), guard)
    before = weights(net)
    saved = get_optimizer_state_dict(net, optimizer)
    assert guard.steps == 0
    assert same(before, weights(net))
    run(net, optimizer, guard, ["a"] * 2 + ["b"] * 2)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    fresh = model()
    other = Guard(fresh, CONFIG)
    resumed = GuardedOptimizer(OPTIMIZERS[name](list(fresh.parameters()), 1e-2), other)
    set_optimizer_state_dict(fresh, resumed, saved)
    assert other.steps == 0
    assert str(resumed.state_dict()) == str(optimizer.state_dict())


def test_a_first_step_at_rate_zero_is_a_step():
    net = model()
    guard = Guard(net, CONFIG)
    run(net, GuardedOptimizer(torch.optim.AdamW(net.parameters(), lr=0.0), guard), guard, ["a"])
    assert guard.domains["a"].own_steps == 1
    optimizer = GuardedOptimizer(torch.optim.AdamW(net.parameters(), lr=0.0), Guard(net, CONFIG))
    x, y = batch(0)
    (net(x) - y).square().mean().backward()
    with pytest.raises(MissingDomainError):
        optimizer.step()
