import copy
import dataclasses
import functools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from interference_guard import Guard, GuardConfig, GuardedOptimizer, reference, renewing
from interference_guard.measuring import look
from interference_guard.probe import Measurement
from interference_guard.renewing import due, renew
from interference_guard.trust_region import Raw, TrustRegion
from tests.unit.helpers import (
    CONFIG,
    Toy,
    guarded,
    pass_rate,
    rollout,
    step_by_hand,
    train,
    two_ranks,
)


def measured(region, found, raw, adapt=True, noise=0.0):
    return region.measured(found, raw, adapt=adapt, noise=noise)


def astray(config=CONFIG, **changes):
    """A guard whose domain math is protected and loses outside of its directions, measured just now."""
    model, guard, optimizer = guarded(config=dataclasses.replace(config, renew=False, **changes))
    train(model, guard, optimizer, ["math"] * 10 + ["code"] * 5)
    state = guard.domains["math"]
    measured(state.region, Measurement("math", 0.05, 0.0, 1.0, "sequence"), Raw(0.1, 0.2))
    guard.config = dataclasses.replace(guard.config, renew=True)
    return model, guard, optimizer, state


@pytest.mark.parametrize(
    ("loss", "inside", "outside", "wanted"),
    [
        (0.05, 0.1, 0.2, True),
        (0.011, 0.1, 0.2, True),
        (0.009, 0.1, 0.2, False),  # under half the budget
        (-0.05, 0.1, 0.2, False),
        (0.05, 0.2, 0.1, False),  # its directions see it
    ],
)
def test_a_region_is_moved_where_its_directions_miss_a_loss(loss, inside, outside, wanted):
    region = TrustRegion(0.02, 0.01, radius=1.0, largest=1.0)
    assert not region.renewable
    measured(region, Measurement("d", loss, 0.0, 1.0, "sequence"), Raw(inside, outside))
    assert region.renewable is wanted


def test_what_is_due():
    _, guard, _, state = astray()
    assert due(guard, state)
    for changes in ({"renew": False}, {"project": False}):
        guard.config = dataclasses.replace(CONFIG, **changes)
        assert not due(guard, state)
    guard.config = CONFIG
    # A probe of an earlier anchor says nothing of this region, and one move is given time to show what it does.
    state.fresh = False
    assert not due(guard, state)
    state.fresh, state.renewed_at = True, state.foreign_steps - CONFIG.probe_steps + 1
    assert not due(guard, state)


def test_the_region_begins_anew_where_the_weights_are():
    model, guard, optimizer, state = astray()
    before = guard.raw_parts(["math"])["math"]
    assert before.quadratic > 0
    old = [block.U.clone() for block in state.model.blocks]
    renew(guard, state)
    assert guard.raw_parts(["math"])["math"].quadratic < 1e-9 * before.quadratic
    assert guard.predicted("math") == state.region.spent == 0.05
    assert (state.radius, state.region.radius, state.renewals) == (None, 0.0, 1)
    assert any(
        a.shape != block.U.shape or not torch.equal(a, block.U)
        for a, block in zip(old, state.model.blocks, strict=True)
    )
    # As after an anchor, the first steps are measured.
    seen = []
    train(model, guard, optimizer, ["code"] * 3, start=15, after=lambda step: seen.append(state.region.radius))
    assert 0 < state.radius.item() < math.inf
    assert seen[0] > 0
    assert guard.metrics()["guard/math/renewals"] == 1.0
    # New sums are one step's with the model's directions: nothing is kept twice.
    basis = state.curvature.sums[0].basis
    assert basis.untyped_storage().data_ptr() == state.model.blocks[0].U.untyped_storage().data_ptr()


def test_the_loss_so_far_stays_on_the_account():
    region = TrustRegion(0.02, 0.01, radius=1.0, largest=1.0)
    for _ in range(5):
        measured(region, Measurement("d", 0.04, 0.0, 1.0, "sequence"), Raw(0.1, 0.3))
    region.move(turned=False)
    # Nothing more is lost there: the scale of old pairs goes on, on top of what is spent.
    assert region.predict(Raw(0.0, 0.0)) == region.spent == 0.04
    assert region.predict(Raw(0.1, 0.3)) == pytest.approx(0.08)
    region.radius = region.largest = 1.0
    measured(region, Measurement("d", 0.05, 0.0, 1.0, "sequence"), Raw(1.0, 0.0))
    assert region.radius == 0.5, "over twice the budget, whatever part of it came later"


def test_nothing_of_the_hosts_is_touched():
    model, guard, _, state = astray()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    renew(guard, state)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert model.training


def test_sums_keep_their_size_for_own_steps_that_follow():
    _, guard, _, state = astray()
    before = state.curvature.mean_energy().item()
    renew(guard, state)
    assert state.curvature.mean_energy().item() == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("allowed", [1, 0])
def test_rows_that_do_not_fit_are_taken_one_by_one_or_not_at_all(monkeypatch, allowed):
    _, guard, _, state = astray()
    made, real = [], reference.add_softened

    def add(guard, curvature, rows, passes, size):
        made.append((passes, size))
        real(guard, curvature, rows, passes, size)
        if size > allowed:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(reference, "add_softened", add)
    U = [block.U for block in state.model.blocks]
    rows = len(state.retained)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        renew(guard, state)
    assert made == [(-(-rows // 8), 8), (rows, 1)]
    assert state.renewals == 1
    if allowed:
        assert not caught
        assert state.curvature.count.item() == pytest.approx(sum(state.curvature.decay**n for n in range(rows)))
        return
    assert "does not fit" in str(caught[0].message)
    assert all(a is block.U for a, block in zip(U, state.model.blocks, strict=True))
    assert guard.raw_parts(["math"])["math"].quadratic < 1e-9
    renew(guard, state)
    assert len(made) == 2, "what failed is not tried again"


def test_a_curvature_that_cannot_be_factored_leaves_the_old_directions(monkeypatch):
    _, guard, _, state = astray()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(renewing, "anchor_domain", full)
    U, sets = [block.U for block in state.model.blocks], (state.protected_set, state.half_set)
    curvature = state.curvature
    with pytest.warns(UserWarning, match="a factorisation of its curvature does not fit"):
        renew(guard, state)
    assert all(a is block.U for a, block in zip(U, state.model.blocks, strict=True))
    assert (state.protected_set, state.half_set) == sets
    assert state.curvature is curvature
    assert not guard.differentiates
    assert guard.raw_parts(["math"])["math"].quadratic < 1e-9, "the region stands at the weights"
    assert guard.metrics()["guard/math/residual"] == 0, "rounding has no part outside"


class Wrapped(nn.Module):
    """A model whose forward pass wants more than tokens."""

    def __init__(self):
        super().__init__()
        self.inner = Toy()

    def forward(self, input_ids, attention_mask=None, *, picture):
        return self.inner(input_ids)


def test_a_host_whose_forward_pass_wants_more_goes_on():
    model = Wrapped()
    config = dataclasses.replace(CONFIG, renew=False)

    def policy(rows):
        logits = model.inner(rows.input_ids)[:, :-1].float()
        scores = torch.log_softmax(logits, -1).gather(2, rows.input_ids[:, 1:].unsqueeze(2)).squeeze(2)
        return nn.functional.pad(scores.detach(), (1, 0))

    guard = Guard(model, config, policy=policy)
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), guard)
    train(model.inner, guard, optimizer, ["math"] * 10 + ["code"] * 5)
    with pytest.warns(UserWarning, match=r"No new directions.*TypeError.*picture"):
        renew(guard, guard.domains["math"])
    train(model.inner, guard, optimizer, ["code"] * 5, start=15)
    assert guard.domains["math"].radius.isfinite()


def test_passes_that_end_half_way_leave_the_directions(monkeypatch):
    _, guard, _, state = astray()
    real, calls = reference._gradients, []

    def gradients(*arguments):
        calls.append(arguments)
        if len(calls) % 3 == 0:
            raise RuntimeError("boom")
        return real(*arguments)

    monkeypatch.setattr(reference, "_gradients", gradients)
    before, sums = [block.U for block in state.model.blocks], state.curvature
    with pytest.warns(UserWarning, match=r"RuntimeError: boom.*old directions"):
        renew(guard, state)
    assert all(a is block.U for a, block in zip(before, state.model.blocks, strict=True))
    assert state.curvature is sums


class Convolved(Toy):
    """With a convolution over activations in another layout, whose gradient takes that layout."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        image = x.reshape(-1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
        x = x + self.conv(image).reshape(x.shape)
        return self.lm_head(self.norm(x + self.mlp["down_proj"](torch.tanh(self.mlp["up_proj"](x)))))


def test_gradients_in_another_layout_than_the_weights_are_taken():
    model = Convolved()
    guard = Guard(model, dataclasses.replace(CONFIG, rank=1, sketch=2))
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), guard)
    train(model, guard, optimizer, ["math"] * 5 + ["code"] * 8 + ["qa"] * 12)
    assert sum(state.renewals for state in guard.domains.values())
    assert guard.differentiates


def test_what_cannot_be_computed_is_known_after_resuming():
    _, guard, _, _ = astray()
    guard.differentiates = False
    other = Guard(Toy(), CONFIG)
    other.load_state_dict(guard.state_dict())
    assert not other.differentiates


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_recompute_go_on_to_do_so(reentrant):
    """As transformers' layers do: in training alone, by a function that a partial holds."""
    model, guard, _, state = astray()
    layer, other, seen = model.mlp["up_proj"], model.mlp["down_proj"], []
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
    layer.register_forward_pre_hook(lambda *_: seen.append((layer.training, other.training)))
    model.train()
    renew(guard, state)
    # Reentrant recomputation cannot be followed by torch.autograd.grad.
    assert set(seen) == {(not reentrant, False)}
    assert guard.differentiates
    assert all(module.training for module in model.modules())


def test_protected_units_follow_the_new_curvature():
    _, guard, _, state = astray(coverage=0.5)
    renew(guard, state)
    covered = sum(block.protected(block.energy).sum() for block in state.model.blocks)
    whole = sum(block.energy.sum() for block in state.model.blocks)
    assert covered >= 0.5 * whole


def test_a_changed_unit_or_scale_reaches_what_is_spent():
    region = TrustRegion(0.02, 0.01, radius=1.0, largest=1.0)
    measured(region, Measurement("d", 0.05, 0.0, 1.0, "sequence"), Raw(0.1, 0.3))
    region.move(turned=True)
    region.truth(0.01)
    assert region.scale < 1
    assert region.spent == pytest.approx(0.05 * region.scale)
    # At the centre itself rounding is all there is.
    measured(region, Measurement("d", 0.06, 0.0, 1.0, "sequence"), Raw(1e-14, 0.0), noise=1e-12)
    assert region.predict(Raw(1e-3, 0.0)) == region.spent
    measured(region, Measurement("d", 0.3, 0.0, 1.0, "nats"), Raw(0.1, 0.3))
    region.move(turned=False)
    measured(region, Measurement("d", 0.001, 0.0, 1.0, "sequence"), Raw(0.1, 0.0))
    assert region.predict(Raw(0.1, 0.0)) == pytest.approx(0.001 * region.scale)


def test_a_ceiling_is_of_the_directions_it_was_found_in():
    region = TrustRegion(0.02, 0.01, radius=1e-3, largest=1e-3)
    region.tighten(1e-3)
    measured(region, Measurement("d", 0.015, 0.0, 1.0, "sequence"), Raw(1e-4, 1e-3))
    region.move(turned=True)
    region.radius = region.largest = 0.3
    measured(region, Measurement("d", 0.015, 0.0, 1.0, "sequence"), Raw(0.29, 0.0))
    assert region.radius == pytest.approx(0.4)


def test_what_a_failed_recovery_brought_back_is_not_taken_away():
    """The region stands where the domain had lost: its own steps must not count as a loss."""
    recovering = {"recovery": True, "recovery_budget": 1e-6, "recovery_tolerance": 1e-7, "recovery_share": 1.0}
    config = dataclasses.replace(CONFIG, rank=1, sketch=2, renew=False, recovery_steps=3)
    model, guard, optimizer = guarded(config=config)
    train(model, guard, optimizer, ["math"] * 30 + ["code"] * 30)
    state = guard.domains["math"]
    guard.measure("math")
    renew(guard, state)
    guard.config = dataclasses.replace(config, **recovering)
    train(model, guard, optimizer, ["code"], start=60)
    assert guard.recovery == "math"
    # More than any rollout brings.
    state.target_reward = 2.0
    before = pass_rate(model, "math")
    train(model, guard, optimizer, ["math"] * 3, start=61)
    assert guard.recovery is None
    assert not guard.schedule.regained
    back = pass_rate(model, "math")
    assert back > before + 0.05
    # Steps of no length: the projection alone acts.
    optimizer.param_groups[0]["lr"] = 1e-9
    train(model, guard, optimizer, ["code"], start=64)
    assert pass_rate(model, "math") == pytest.approx(back, abs=0.005)
    # What came back is off the account too, corrected by what the phase's own rollouts have shown.
    assert guard.predicted("math") == pytest.approx(look(guard, state).loss * state.region.scale, abs=1e-3)


def test_a_domain_that_recovers_keeps_its_region():
    recovering = {"recovery": True, "recovery_budget": 1e-6, "recovery_tolerance": 1e-7}
    _, guard, _, state = astray(**recovering)
    guard.schedule = dataclasses.replace(guard.schedule, phase="recovering", domain="math")
    assert not due(guard, state)


def test_a_run_that_moved_regions_resumes_exactly():
    model, guard, optimizer, state = astray()
    renew(guard, state)
    saved = guard.state_dict()
    again, other, stepper = guarded(seed=7)
    again.load_state_dict(model.state_dict())
    stepper.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(saved)
    for m, g, o in ((model, guard, optimizer), (again, other, stepper)):
        train(m, g, o, ["code"] * 12, start=15)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for a, b in ((guard, other), (other, guard)):
        assert a.domains["math"].region == b.domains["math"].region
    assert other.domains["math"].renewals >= 1


def test_a_long_foreign_run_moves_regions_by_itself():
    """Two directions a matrix miss most of what moves: the probe finds it."""
    config = dataclasses.replace(CONFIG, rank=1, sketch=2)
    model, guard, optimizer = guarded(config=config)
    train(model, guard, optimizer, ["math"] * 30 + ["code"] * 40 + ["qa"] * 40)
    assert guard.domains["math"].renewals > 0
    model, guard, optimizer = guarded(config=dataclasses.replace(config, renew=False))
    train(model, guard, optimizer, ["math"] * 30 + ["code"] * 40 + ["qa"] * 40)
    assert guard.domains["math"].renewals == 0


@pytest.mark.parametrize("holders", [(0, 1), (0,)])
def test_ranks_move_alike_also_where_one_has_no_rows(holders):
    """Two ranks as two guards whose reductions meet, each with rows of its own."""
    # Seeded one after the other: the threads share the global generator.
    models = [Toy(), Toy()]

    def rank(number, reduce):
        model = models[number]
        guard = Guard(model, GuardConfig(rank=2, sketch=4, residual=4, probe_steps=5), reduce=reduce)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step, domain in enumerate(["math"] * 10 + ["code"] * 6):
            # The ranks meet the domains in another order than they train them.
            holds = number in holders or domain != "math"
            kept = rollout(model, domain, seed=100 * number + step) if holds else None
            step_by_hand(model, guard, optimizer, domain, step, kept)
        state = guard.domains["math"]
        before = [block.U for block in state.model.blocks]
        renew(guard, state)
        turned = not any(a is block.U for a, block in zip(before, state.model.blocks, strict=True))
        found = [tensor for block in state.model.blocks for tensor in (block.U, block.z0, block.energy)]
        return turned, guard.differentiates, found

    first, second = two_ranks(rank)
    # A rank without rows adds nothing, and takes over what the others found.
    assert first[:2] == second[:2] == (True, True)
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))
