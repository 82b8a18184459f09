"""Interleaved and mixed training: what is protected and measured in each case."""

import dataclasses
import warnings

import pytest
import torch

from interference_guard.stepping import MIXED
from tests.unit.helpers import CONFIG, guarded, pass_rate, policy_gradient, rollout, train

TURNS = ["math", "code", "qa"] * 20


def test_in_turn_every_other_domain_is_protected():
    model, guard, optimizer = guarded(rate=0.005)
    train(model, guard, optimizer, TURNS)
    # The last one trained gets its anchor when the next step begins.
    assert guard.protected == ("code", "math")
    for name in guard.protected:
        state = guard.domains[name]
        assert state.subspace.item() <= state.radius.item() * 1.05


def test_in_turn_a_domain_is_scored_seldom():
    model, guard, optimizer = guarded(rate=0.005)
    calls = []
    policy = guard.policy
    guard.policy = lambda rows: (calls.append(len(rows)), policy(rows))[1]
    train(model, guard, optimizer, TURNS)
    # Each domain is anchored 20 times; its probe is set up anew no more often than every probe_steps steps,
    # and then read after the first and second foreign step.
    most = 3 * (1 + len(TURNS) // CONFIG.probe_steps) * 3
    assert 0 < len(calls) <= most


def test_in_turn_with_the_first_order_term():
    config = dataclasses.replace(CONFIG, first_order=True)
    model, guard, optimizer = guarded(rate=0.005, config=config)
    train(model, guard, optimizer, TURNS)
    seen = guard.raw_parts(["code", "math"])
    assert all(raw.linear != 0 for raw in seen.values())
    assert all(pass_rate(model, name) > 0.3 for name in ("math", "code", "qa"))


def test_a_mixed_step_adds_to_no_curvature():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 5)
    before = [sums.energy.clone() for sums in guard.domains["math"].curvature.sums]
    a, b = rollout(model, "math"), rollout(model, "code")
    with guard.domain({"math": 0.5, "code": 0.5}):
        (policy_gradient(model, a) + policy_gradient(model, b)).backward()
        with pytest.warns(UserWarning, match=r"trained the domains \['code', 'math'\] together.*order_by_domain"):
            optimizer.step()
        optimizer.zero_grad()
    after = [sums.energy for sums in guard.domains["math"].curvature.sums]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not guard.domains["code"].curvature.sums
    assert not guard.domains["math"].anchored
    # Later math has an anchor again, with what its own steps told; code has told nothing.
    # That was said, and no more: its gradients were not zero.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, guard, optimizer, ["qa"], start=20)
    assert guard.domains["math"].anchored
    assert not guard.domains["code"].anchored


def test_a_domain_under_the_share_is_protected_in_a_mixed_step():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 20 + ["code"] * 2)
    with guard.domain({"code": 0.97, "math": 0.03}):
        policy_gradient(model, rollout(model, "code")).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = guard.domains["math"]
    assert state.anchored
    assert state.foreign_steps == 3
    assert state.subspace.item() <= state.radius.item() * (1 + 1e-3)


def mixed_step(model, guard, optimizer, step):
    with guard.domain({"math": 0.5, "code": 0.5}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A step trained the domains")
        for name in ("math", "code"):
            rows = rollout(model, name, seed=step)
            guard.retain(name, rows)
            policy_gradient(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        guard.probe()


def test_a_mixed_step_at_a_seam_leaves_the_anchor_where_it_was():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 20 + ["code"] * 5)
    state = guard.domains["math"]
    anchor, scores = state.model.blocks[0].z0.clone(), state.anchor_scores.clone()
    for start in (25, 30):
        # Two seams with steps of one domain between them are no mixed training.
        for step in range(3):
            mixed_step(model, guard, optimizer, start + step)
        assert not state.pending
        train(model, guard, optimizer, ["code"], start=start + 3)
    assert (state.anchored, state.own_steps, state.foreign_steps) == (True, 0, 7)
    assert torch.equal(state.model.blocks[0].z0, anchor)
    assert torch.equal(state.anchor_scores, scores)


def test_mixed_training_lets_the_anchor_go():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 20 + ["code"] * 5)
    anchor = guard.domains["math"].model.blocks[0].z0.clone()
    for step in range(MIXED + 1):
        assert guard.domains["math"].anchored
        mixed_step(model, guard, optimizer, 25 + step)
    assert not guard.domains["math"].anchored
    train(model, guard, optimizer, ["code"], start=60)
    assert guard.domains["math"].anchored
    assert not torch.equal(guard.domains["math"].model.blocks[0].z0, anchor)
