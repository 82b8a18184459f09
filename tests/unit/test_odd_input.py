"""Input that is legal and seldom: it must neither spoil what is known nor end a run."""

import os
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from interference_guard import Completions, Guard, GuardConfig, GuardedOptimizer, StateError, curvature, renewing
from interference_guard.analysis.measured import read_rows
from interference_guard.local_block import Correction
from interference_guard.reference import add_softened
from interference_guard.renewing import renew
from tests.unit.helpers import CONFIG, Toy, guarded, policy_gradient, rollout, step_by_hand, train
from tests.unit.test_renewing import astray


def rows(rewards):
    count = len(rewards)
    ids = torch.arange(count * 4).view(count, 4) % 7
    return Completions(ids, torch.ones_like(ids), torch.ones_like(ids), torch.tensor(rewards))


def guard_of(**options):
    return Guard(torch.nn.Linear(4, 3), GuardConfig(rank=2, sketch=4, **options))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_rows_with_a_reward_that_is_no_number_are_left_out(odd):
    guard = guard_of()
    guard.retain("math", rows([0.0, odd, 1.0]))
    state = guard.domains["math"]
    assert state.latest(8).rewards.tolist() == [0.0, 1.0]
    assert (state.low, state.high) == (0.0, 1.0)
    guard.retain("code", rows([odd]))
    assert "code" not in guard.domains


@pytest.mark.parametrize("odd", [float("nan"), float("-inf")])
def test_an_evaluation_that_is_no_number_spoils_nothing(odd):
    _, guard, _, state = astray()
    guard.measure("math")
    before = state.region.state()
    guard.calibrate("math", odd)
    assert state.region.state() == before
    state.region.truth(odd)
    assert state.region.state() == before


def test_a_guard_that_is_off_saves_and_loads_nothing(tmp_path):
    guard = guard_of(enabled=False)
    assert guard.state_dict() == {}
    assert guard.raw_parts() == {}
    guard.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    guard.load(tmp_path)
    guard.load_state_dict({})


def test_a_save_that_fails_half_way_leaves_the_state_before(tmp_path, monkeypatch):
    _, guard, _, _ = astray()
    guard.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    guard.calibrate("math", 0.25)
    real, moves = os.replace, []

    def second_fails(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(StateError, match="No space left"):
        guard.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    guard.load(tmp_path)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_host_in_inference_mode_changes_nothing(mode, monkeypatch):
    monkeypatch.setattr(renewing, "due", lambda guard, state: guard.steps == 10)

    def run(mode):
        model, guard, optimizer = guarded()
        for step, name in enumerate(["math"] * 5 + ["code"] * 5 + ["math"] * 2 + ["qa"] * 2):
            trained = rollout(model, name, seed=step)
            with mode():
                guard.retain(name, trained.detached())
            with guard.domain(name):
                policy_gradient(model, trained).backward()
                optimizer.step()
                optimizer.zero_grad()
            with mode():
                guard.probe()
                guard.load_state_dict(guard.state_dict())
        return guard

    plain, found = run(nullcontext), run(mode)
    assert found.differentiates
    assert found.domains["math"].renewals == plain.domains["math"].renewals == 1
    assert found.domains["math"].measurement == plain.domains["math"].measurement
    assert torch.equal(found.model.embed.weight, plain.model.embed.weight)


def test_a_moved_region_keeps_no_graph():
    _, guard, _, state = astray()
    renew(guard, state)
    assert not any(block.z0.requires_grad for block in state.model.blocks)


def test_a_term_that_was_switched_off_is_let_go():
    _, guard, _, state = astray(first_order=True)
    assert state.slopes is not None
    saved = guard.state_dict()
    other = Guard(guard.model, replace(guard.config, first_order=False))
    other.load_state_dict(saved)
    assert other.domains["math"].slopes is None
    assert other.domains["math"].gradient is None
    assert other.raw_parts()["math"].linear == 0


def test_virtual_tokens_in_front_are_no_rows_of_their_own():
    class Prompted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(7, 7)

        def forward(self, input_ids, attention_mask):
            logits = self.embed(input_ids)
            return torch.cat([logits[:, :2], logits], 1)

    model = Prompted()
    guard = Guard(model, GuardConfig(rank=2, sketch=4))
    sums = guard.new_state("math").curvature
    add_softened(guard, sums, rows([0.0, 1.0]), 2, 1)
    assert sums.count.item() > 0


def test_only_a_line_feed_ends_a_line_of_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b", "completion": "c"}\n\n', encoding="utf-8")
    assert read_rows(path) == [("a\u2028b", "c")]


def test_weights_in_fp64_are_projected_in_fp64():
    model = torch.nn.Linear(4, 3).double()
    guard = Guard(model, GuardConfig(rank=2, sketch=4))
    before = model.weight.detach().clone()
    guard.view.subtract([_nothing(block) for block in guard.view.blocks], 0)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("where", ["policy", "factorisation"])
def test_an_anchor_that_fails_is_set_again(where, monkeypatch):
    """A host catches what ended its step, and goes on."""

    def run(fails):
        model, guard, optimizer = guarded()
        train(model, guard, optimizer, ["math"] * 8)
        if fails:
            with monkeypatch.context() as patch:
                if where == "policy":
                    patch.setattr(guard, "policy", _raises)
                else:
                    steps = iter([curvature.nystrom, _raises])
                    patch.setattr(curvature, "nystrom", lambda *matrices: next(steps)(*matrices))
                guard.begin({"code": 1.0})
                with pytest.raises(torch.OutOfMemoryError):
                    guard.before_step()
        train(model, guard, optimizer, ["code"] * 4, start=8)
        return guard

    plain, disturbed = run(False), run(True)
    assert disturbed.domains["math"].measurement == plain.domains["math"].measurement is not None
    assert torch.equal(disturbed.model.embed.weight, plain.model.embed.weight)


def test_an_anchor_that_fails_again_and_again_keeps_each_row_once():
    model, guard, optimizer = guarded(config=replace(CONFIG, retain=256))
    train(model, guard, optimizer, ["math"] * 2)
    good = guard.policy
    for policy in (_raises, _raises, good):
        guard.policy = policy
        with pytest.raises(torch.OutOfMemoryError) if policy is _raises else nullcontext():
            train(model, guard, optimizer, ["code"], start=2)
    assert len(guard.domains["math"].retained) == 2 * 32


def test_a_probe_whose_policy_raises_is_made_when_it_is_asked_for_again():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 5)
    step_by_hand(model, guard, optimizer, "code", 5)
    with pytest.raises(torch.OutOfMemoryError):
        guard.probe(_raises)
    assert set(guard.probe()) == {"math"}
    assert guard.probe() == {}


@pytest.mark.parametrize("announce", ["block", "begin"])
def test_a_state_may_be_read_once_a_step_is_announced(announce):
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 2)
    saved = guard.state_dict()
    model, guard, optimizer = guarded()
    with guard.domain("qa") if announce == "block" else nullcontext(guard.begin({"qa": 1.0})):
        guard.load_state_dict(saved)
        policy_gradient(model, rollout(model, "qa")).backward()
        optimizer.step()
    assert guard.domains["qa"].own_steps == 1
    assert guard.announced == {"math", "code", "qa"}
    # After it a state is what was saved.
    guard.load_state_dict(saved)
    assert set(guard.domains) == guard.announced == {"math", "code"}


def test_weights_that_were_no_numbers_for_a_step_leave_no_trace_in_what_was_taken():
    model, guard, optimizer = guarded(rate=0.1)
    train(model, guard, optimizer, ["math"] * 5 + ["code"] * 3)
    assert guard.domains["math"].moved is not None
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    guard.begin({"code": 1.0})
    guard.before_step()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    guard.after_step()
    model.load_state_dict(kept)
    step_by_hand(model, guard, optimizer, "code", 9)
    assert guard.domains["math"].moved.isfinite().all()


def _raises(*arguments):
    raise torch.OutOfMemoryError("out of memory")


def _nothing(block):
    matrices, units, width = block.region.size
    return Correction(torch.zeros(matrices, units, 1), torch.zeros(matrices, width, 1))


def test_rewards_count_once_a_domain_that_had_none_has_some():
    model, guard, optimizer = guarded()

    def bare(rows):
        return replace(rows, rewards=None)

    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 3, keep=bare)
    # Few rows a time: without the earlier ones the probe is smaller, and in reward.
    order = ["math", "code"] * 3
    train(model, guard, optimizer, order, start=6, keep=lambda rows: rows.rows(slice(0, 8)))
    train(model, guard, optimizer, ["qa"] * 6, start=12)
    for name in ("math", "code"):
        assert guard.domains[name].retained.rewards is not None
        assert guard.metrics()[f"guard/{name}/nats"] == 0.0


@pytest.mark.parametrize("reward", [np.float32(0.5), torch.tensor(0.5)])
def test_an_evaluation_in_other_numbers_can_be_saved(reward, tmp_path):
    _model, guard, _ = guarded()
    guard.retain("math", rows([0.0, 1.0]))
    guard.calibrate("math", reward)
    guard.load_state_dict(guard.state_dict())
    guard.save(tmp_path)
    guard.load(tmp_path)
    assert guard.domains["math"].anchor_reward == 0.5


def test_a_weight_that_is_frozen_on_the_way_has_no_gradient():
    model = Toy()
    guard = Guard(model, replace(CONFIG, rank=1, sketch=2))
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), guard)
    train(model, guard, optimizer, ["math"] * 5)
    model.embed.requires_grad_(False)
    train(model, guard, optimizer, ["code"] * 8 + ["qa"] * 12, start=5)
    assert sum(state.renewals for state in guard.domains.values())
    assert guard.differentiates


def test_gradients_of_some_rows_of_an_embedding_are_taken():
    found = {}
    for sparse in (False, True):
        model = Toy()
        model.embed = torch.nn.Embedding.from_pretrained(model.embed.weight.detach(), freeze=False, sparse=sparse)
        guard = Guard(model, CONFIG)
        optimizer = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.02), guard)
        train(model, guard, optimizer, ["math"] * 3 + ["code"] * 3)
        found[sparse] = guard.raw("math")
    assert found[True] == pytest.approx(found[False], rel=1e-4)
    assert found[True] > 0


@pytest.mark.filterwarnings("ignore:No completions of domain")
def test_an_optimizer_may_find_its_rate_itself():
    model = Toy()
    guard, inner = Guard(model, CONFIG), torch.optim.SGD(model.parameters(), lr=0.02)
    optimizer = GuardedOptimizer(inner, guard)

    def no_rate(*_):
        inner.param_groups[0]["lr"] = None

    def rate(*_):
        inner.param_groups[0]["lr"] = 0.02

    # What adafactor's groups say outside of its own step.
    for step, domain in enumerate(["math", "code"]):
        no_rate()
        with guard.domain(domain):
            guard.begin({domain: 1.0})
            model(torch.tensor([[step]])).square().mean().backward()
            handle = inner.register_step_pre_hook(rate)
            optimizer.step()
            handle.remove()
    assert guard.steps == 2


def test_an_optimizer_that_steps_inside_of_the_backward_pass_is_named_as_a_cause():
    model = Toy()
    guard = Guard(model, CONFIG)
    for parameter in model.parameters():
        inner = torch.optim.SGD([parameter], lr=0.1)

        def step(parameter, inner=inner):
            inner.step()
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(step)

    def train_on(domain):
        with guard.domain(domain):
            policy_gradient(model, rollout(model, domain)).backward()
            guard.before_step()
            guard.after_step()

    for _ in range(5):
        train_on("math")
    with pytest.warns(UserWarning, match=r"gone when the guard looked, .* inside of hooks of the backward pass"):
        train_on("code")
    assert not guard.domains["math"].anchored
