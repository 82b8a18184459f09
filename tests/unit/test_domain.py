"""Which completions a domain keeps for its probe."""

from dataclasses import replace

import pytest
import torch

from interference_guard import GuardConfig, stepping
from interference_guard.domain import POOL
from interference_guard.probe import Completions, evenly, join
from tests.unit.helpers import guarded, train

PROMPTS, ANSWERS = 2, 8
LIMIT = PROMPTS * ANSWERS


def rollouts(step):
    """A step's rows, prompt by prompt; the reward numbers the prompts of all steps."""
    ids = torch.ones(LIMIT, 3, dtype=torch.int64)
    prompts = torch.arange(PROMPTS).repeat_interleave(ANSWERS) + PROMPTS * step
    return Completions(ids, ids, ids, prompts.float())


def state():
    _model, guard, _ = guarded(config=GuardConfig(retain=LIMIT))
    return guard.state_of("math")


def keep(domain, rows):
    """The rows of one step."""
    domain.keep(rows, LIMIT, domain.own_steps)
    domain.own_steps += 1


def kept(domain):
    return domain.latest(LIMIT).rewards.tolist()


def test_rows_are_spread_evenly_up_to_the_last():
    assert evenly(12, 4).tolist() == [2, 5, 8, 11]
    assert evenly(13, 10).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12]
    assert evenly(3, 10).tolist() == [0, 1, 2]
    assert evenly(0, 10).tolist() == []


def test_the_probe_is_of_as_many_prompts_as_the_latest_steps_had():
    domain = state()
    for step in range(9):
        keep(domain, rollouts(step))
    latest = [float(prompt) for prompt in range((9 - POOL) * PROMPTS, 9 * PROMPTS)]
    assert sorted(set(kept(domain))) == latest
    assert {kept(domain).count(prompt) for prompt in latest} == {LIMIT // len(latest)}
    # Older ones take no room.
    assert sum(map(len, domain.pending)) == POOL * LIMIT


def test_a_step_that_comes_in_parts_is_one():
    whole, parts = state(), state()
    for step in range(9):
        keep(whole, rollouts(step))
        for start in range(0, LIMIT, 4):
            parts.keep(rollouts(step).rows(slice(start, start + 4)), LIMIT, step)
        parts.own_steps += 1
    assert kept(parts) == kept(whole)


def test_rows_that_cannot_be_joined_leave_those_before(monkeypatch):
    domain = state()
    domain.keep(rollouts(0), LIMIT, 0)

    def full(parts):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("interference_guard.domain.join", full)
        with pytest.raises(torch.OutOfMemoryError):
            domain.keep(rollouts(1), LIMIT, 0)
    assert kept(domain) == rollouts(0).rewards.tolist()


def test_kept_ids_are_of_the_type_that_scores_are_gathered_by():
    domain = state()
    ids = torch.ones(2, 3, dtype=torch.int32)
    keep(domain, Completions(ids, ids, ids))
    assert domain.latest(LIMIT).input_ids.dtype == torch.int64


def test_rows_of_a_step_are_let_go_of_alone():
    domain = state()
    keep(domain, rollouts(0))
    domain.keep(rollouts(1), LIMIT, 7)
    domain.discard(6)
    assert len(domain.pending) == 2
    domain.discard(7)
    domain.discard(7)
    assert set(kept(domain)) == {float(prompt) for prompt in range(PROMPTS)}


@pytest.mark.parametrize("own_steps", [0, 2])
def test_rows_of_a_held_domain_are_kept_after_own_steps_alone(own_steps):
    model, guard, optimizer = guarded(config=GuardConfig(retain=LIMIT, rank=2, sketch=4))
    train(model, guard, optimizer, ["math"] * 2 + ["code"])
    math = guard.domains["math"]
    assert math.anchored
    math.forget_pending()
    # After the own steps of a recovery, by a host that keeps rows once a step is made.
    math.own_steps = own_steps
    newest = rollouts(9)
    guard.retain("math", newest)
    guard.begin({"code": 1.0})
    stepping.open_step(guard)
    assert not math.pending
    assert set(newest.rewards.tolist()).issubset(math.retained.rewards.tolist()) == bool(own_steps)


def test_small_steps_reach_no_further_back_than_they_must():
    domain = state()
    for step in range(40):
        keep(domain, rollouts(step).rows(slice(0, 2)))
    assert kept(domain) == [float(PROMPTS * step) for step in range(32, 40) for _ in range(2)]


def test_a_short_training_is_kept_whole():
    domain = state()
    keep(domain, rollouts(0).rows(slice(0, 6)))
    keep(domain, rollouts(1).rows(slice(0, 5)))
    assert len(domain.latest(LIMIT)) == 11


def test_rows_of_the_probe_before_fill_up_where_new_ones_are_few():
    domain = state()
    for step in range(4):
        keep(domain, rollouts(step))
    domain.retained = domain.latest(LIMIT)
    before = domain.retained.rewards.tolist()
    domain.forget_pending()
    assert kept(domain) == before
    keep(domain, rollouts(10).rows(slice(0, 6)))
    assert kept(domain)[-6:] == [20.0] * 6
    assert sorted(set(kept(domain)[:-6])) == sorted(set(before))
    keep(domain, rollouts(11).rows(slice(0, 10)))
    assert min(kept(domain)) == 20


def cut_off(rows, places):
    """The rows with nothing to score at these places, as where a host masks answers that were cut off."""
    mask = rows.completion_mask.clone()
    mask[places] = 0
    return replace(rows, completion_mask=mask)


def test_a_probe_is_made_of_rows_that_can_be_scored():
    domain = state()
    for step in range(8):
        keep(domain, cut_off(rollouts(step), slice(0, ANSWERS)))
    # The second prompt of each of the last four steps.
    assert sorted(set(kept(domain))) == [9.0, 11.0, 13.0, 15.0]
    assert len(kept(domain)) == LIMIT
    few = state()
    for step in range(40):
        keep(few, cut_off(rollouts(step).rows(slice(0, 4)), slice(0, 2)))
    # It takes more steps to find as many of them.
    assert len(kept(few)) == LIMIT
    assert few.latest(LIMIT).scorable.all()
    assert len(few.pending) == LIMIT // 2
    rare = state()
    for step in range(400):
        keep(rare, cut_off(rollouts(step), slice(1, None)))
    assert sum(map(len, rare.pending)) == POOL * LIMIT
    assert kept(rare) == [float(PROMPTS * step) for step in range(396, 400)]


def test_where_none_can_be_scored_all_are_kept():
    domain = state()
    keep(domain, cut_off(rollouts(0), slice(None)))
    assert len(kept(domain)) == LIMIT


def test_the_reward_at_an_anchor_is_of_the_rows_that_were_left_out_too():
    model, guard, optimizer = guarded(config=GuardConfig(rank=2, sketch=4, retain=LIMIT))

    def worthless(rows):
        half = len(rows) // 2
        rewards = torch.cat([torch.zeros(half), torch.ones(len(rows) - half)])
        return cut_off(replace(rows, rewards=rewards), slice(0, half))

    train(model, guard, optimizer, ["math"] * 3 + ["code"], keep=worthless)
    math = guard.domains["math"]
    assert math.retained.rewards.tolist() == [1.0] * len(math.retained)
    assert math.retained_reward == math.anchor_reward == math.target_reward == 0.5


def test_steps_of_turns_are_not_taken_for_parts_of_one():
    # Its second anchor is too near the first to be scored, and its own steps are counted anew from there.
    model, guard, optimizer = guarded(config=GuardConfig(rank=4, sketch=8, probe_steps=50, refresh_steps=50))
    train(model, guard, optimizer, ["math", "code"] * 3)
    math = guard.domains["math"]
    assert math.scored_at == 1
    assert len(math.pending) == 2


def test_rows_are_chosen_before_they_are_moved(monkeypatch):
    _model, guard, _ = guarded(config=GuardConfig(retain=LIMIT))
    moved, to = [], Completions.to

    def counted(self, device):
        moved.append(len(self))
        return to(self, device)

    monkeypatch.setattr(Completions, "to", counted)
    rows = join([rollouts(step) for step in range(4)])
    guard.retain("math", rows)
    assert moved
    assert max(moved) == LIMIT
    # All of them count for the rewards.
    assert guard.domains["math"].span == (0.0, 7.0)
    assert guard.domains["math"].rewarded == 4 * LIMIT
    assert kept(guard.domains["math"]) == rows.evenly(LIMIT).rewards.tolist()
