"""Which completions a domain keeps for its probe."""

import torch

from interference_guard import GuardConfig
from interference_guard.domain import POOL
from interference_guard.probe import Completions, spread
from tests.unit.test_guard import guarded

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


def kept(domain):
    return domain.latest(LIMIT).rewards.tolist()


def test_rows_are_spread_evenly_up_to_the_last():
    assert spread(12, 4).tolist() == [2, 5, 8, 11]
    assert spread(13, 10).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12]
    assert spread(3, 10).tolist() == [0, 1, 2]
    assert spread(0, 10).tolist() == []


def test_the_probe_is_of_as_many_prompts_as_the_latest_steps_had():
    domain = state()
    for step in range(9):
        domain.keep(rollouts(step), LIMIT)
    latest = [float(prompt) for prompt in range((9 - POOL) * PROMPTS, 9 * PROMPTS)]
    assert sorted(set(kept(domain))) == latest
    assert {kept(domain).count(prompt) for prompt in latest} == {LIMIT // len(latest)}
    # Older ones take no room.
    assert sum(map(len, domain.pending)) <= POOL * LIMIT


def test_a_short_training_is_kept_whole():
    domain = state()
    domain.keep(rollouts(0).rows(slice(0, 6)), LIMIT)
    domain.keep(rollouts(1).rows(slice(0, 5)), LIMIT)
    assert len(domain.latest(LIMIT)) == 11


def test_rows_of_the_anchor_before_are_pushed_out_by_later_ones():
    domain = state()
    for step in range(4):
        domain.keep(rollouts(step), LIMIT)
    domain.retained = domain.latest(LIMIT)
    before = domain.retained.rewards.tolist()
    domain.carry()
    assert kept(domain) == before
    # A recovery of one step, or training that goes from domain to domain: both are of their prompts.
    domain.keep(rollouts(10), LIMIT)
    assert [sum(prompt < 20 for prompt in kept(domain)), sum(prompt >= 20 for prompt in kept(domain))] == [8, 8]
    for step in range(11, 10 + POOL):
        domain.keep(rollouts(step), LIMIT)
    assert min(kept(domain)) == 20
