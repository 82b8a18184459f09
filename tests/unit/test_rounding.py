import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from interference_guard import Guard, GuardConfig, GuardedOptimizer
from interference_guard.rounding import round_at_random


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(0, 2**31))
def test_the_result_is_one_of_the_two_neighbours(value, seed):
    exact = torch.tensor([value])
    (found,) = round_at_random(exact, generator(seed)).float().tolist()
    # Cut off the dropped bits: the neighbour toward zero. The next one away from it has one bit more.
    toward = (exact.view(torch.int32) & -65536).view(torch.float32)
    away = (toward.view(torch.int32) + 65536).view(torch.float32)
    assert found in ((toward.item(),) if toward.item() == exact.item() else (toward.item(), away.item()))


@pytest.mark.parametrize("value", [1.001, -1.001, 0.0203, -3e-6, 1.0078])
def test_the_expectation_is_the_value(value):
    many = torch.full((200_000,), value)
    found = round_at_random(many, generator()).double()
    step = found.max() - found.min()
    assert step > 0
    # Standard error of a mean of numbers one step apart, at most.
    assert abs(found.mean() - many[0].double()) < 5 * 0.5 * step / len(many) ** 0.5


def test_numbers_of_the_format_stay():
    values = torch.randn(1000).bfloat16()
    assert torch.equal(round_at_random(values.float(), generator()), values)
    # What a GPU calls NaN has all bits set, to which nothing can be added.
    full = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert round_at_random(full, generator()).isnan().all()
    odd = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 1e-40])
    found = round_at_random(odd, generator())
    assert found[:3].tolist() == [0.0, torch.inf, -torch.inf]
    assert found[3].isnan()
    assert found[4].isfinite()


def test_the_bits_depend_on_the_generator_alone():
    values = torch.randn(50, 8).mT
    before = torch.random.get_rng_state()
    assert torch.equal(round_at_random(values, generator(3)), round_at_random(values, generator(3)))
    assert not torch.equal(round_at_random(values, generator(3)), round_at_random(values, generator(4)))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("stochastic", [True, False])
def test_small_steps_stay_inside_only_where_they_are_rounded_at_random(stochastic):
    """AdamW at 1e-4 moves weights of size 0.02 by about half a step of bf16; the correction by much less."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(256, 128, bias=False)
    with torch.no_grad():
        model.weight.copy_(0.02 * torch.randn(128, 256, generator=generator))
    model.to(torch.bfloat16)
    guard = Guard(model, GuardConfig(stochastic_rounding=stochastic))
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.0), guard)
    directions = torch.linalg.qr(torch.randn(256, 16, generator=generator)).Q
    drift, excess = torch.randn(128, 256, generator=generator), []
    for step in range(62):
        own = step < 12
        gradient = torch.randn(128, 16, generator=generator) @ directions.T if own else drift
        model.weight.grad = gradient.bfloat16()
        optimizer.param_groups[0]["lr"] = 0.0 if own else 1e-4
        with guard.domain("own" if own else "other"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no completions are retained here
            optimizer.step()
        if step == 12:
            # Four steps' length, as measurements would have made it.
            region = guard.domains["own"].region
            region.radius = 16 * float(guard.domains["own"].radius)
            guard.domains["own"].follow_region()
        if not own:
            excess.append(guard.metrics()["guard/own/excess"])
    late = sum(excess[-10:]) / 10
    assert late < 0.05 if stochastic else late > 0.2
