import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interference_guard import ConfigError, Guard, GuardConfig
from interference_guard.recovering import _regained, follow
from interference_guard.recovery import PATIENCE, RecoveryLimits, RecoverySchedule, expected_steps
from tests.unit.helpers import CONFIG, guarded, pass_rate, policy_gradient, rollout, train

LIMITS = RecoveryLimits(steps=3, cooldown=4, share=0.25)
excesses = st.dictionaries(st.sampled_from("abc"), st.floats(0, 5), max_size=3)
walks = st.lists(st.tuples(excesses, st.booleans()), max_size=120)
limits = st.builds(
    RecoveryLimits, steps=st.integers(1, 6), cooldown=st.integers(0, 8), share=st.floats(0.01, 1.0)
)


def walk(inputs, limits, start=0):
    """The schedules of a run; one input a step."""
    schedule, found = RecoverySchedule(), []
    for step, (excess, regained) in enumerate(inputs, start + 1):
        schedule = schedule.step(regained, step, limits).start(excess, step, limits)
        found.append(schedule)
    return found


@given(walks, limits)
def test_no_input_passes_the_cap(inputs, limits):
    for step, schedule in enumerate(walk(inputs, limits), 1):
        assert schedule.total <= limits.share * step + 1e-9


@given(walks, limits)
def test_no_input_shortens_the_cool_down(inputs, limits):
    found = walk(inputs, limits)
    ended = None
    for step, (before, now) in enumerate(pairwise(found)):
        if before.phase == "recovering" and now.total > before.total and now.phase != "recovering":
            ended = step
        if now.phases > before.phases and ended is not None:
            assert step - ended >= limits.cooldown


@given(walks, limits)
def test_phases_are_never_longer_than_allowed(inputs, limits):
    for schedule in walk(inputs, limits):
        assert schedule.taken <= limits.steps
        assert (schedule.domain is not None) == (schedule.phase == "recovering")


@given(walks, limits)
def test_nothing_starts_below_the_recovery_budget(inputs, limits):
    calm = [({name: value / 5.01 for name, value in excess.items()}, regained) for excess, regained in inputs]
    assert all(schedule == RecoverySchedule() for schedule in walk(calm, limits))


def test_the_worst_domain_recovers_first():
    schedule = RecoverySchedule().start({"a": 1.1, "b": 2.0, "c": 1.9}, 100, LIMITS)
    assert schedule.domain == "b"


def test_a_phase_ends_when_the_reward_is_back():
    schedule = RecoverySchedule().start({"a": 1.0}, 100, LIMITS).step(False, 101, LIMITS)
    assert (schedule.phase, schedule.taken) == ("recovering", 1)
    schedule = schedule.step(True, 102, LIMITS)
    assert (schedule.phase, schedule.regained, schedule.failures, schedule.total) == ("cooling", True, 0, 2)


def test_a_domain_that_failed_waits_twice_as_long():
    gaps, schedule, step, ends = [], RecoverySchedule(), 1000, []
    while len(gaps) < 3:
        step += 1
        before = schedule.phases
        was = schedule.phase
        schedule = schedule.step(False, step, LIMITS)
        if was == "recovering" and schedule.phase != was:
            ends.append(step)
        schedule = schedule.start({"a": 2.0}, step, LIMITS)
        if schedule.phases > before and ends:
            gaps.append(step - ends[-1])
    assert gaps == [2 * LIMITS.cooldown] * 3


def test_another_domain_need_not_wait_for_one_that_failed():
    schedule, step = RecoverySchedule().start({"a": 2.0}, 1000, LIMITS), 1000
    while schedule.phase != "idle":
        step += 1
        schedule = schedule.step(False, step, LIMITS)
    assert schedule.start({"a": 2.0}, step, LIMITS).domain is None
    assert schedule.start({"a": 2.0, "b": 1.0}, step, LIMITS).domain == "b"


def phase(schedule, excess, step, *, regained):
    """One whole phase; the schedule when the next may start, and the domain it had."""
    schedule = schedule.start(excess, step, LIMITS)
    name = schedule.domain
    while schedule.phase != "idle":
        step += 1
        schedule = schedule.step(regained, step, LIMITS)
    # Past every wait, so that only the claims decide.
    return schedule, name, step + 10 * LIMITS.cooldown


def test_domains_that_cannot_be_brought_back_take_turns():
    excess, had, schedule, step = {"a": 4.0, "b": 3.0, "c": 1.0}, [], RecoverySchedule(), 1000
    for _ in range(7):
        schedule, name, step = phase(schedule, excess, step, regained=False)
        had.append(name)
    assert had == ["a", "b", "a", "b", "a", "c", "b"]


def test_a_domain_that_came_back_has_its_full_claim_again():
    excess, schedule, step = {"a": 3.0, "b": 2.0}, RecoverySchedule(), 1000
    schedule, _, step = phase(schedule, excess, step, regained=False)
    schedule, _, step = phase(schedule, excess, step, regained=False)
    schedule, name, step = phase(schedule, excess, step, regained=True)
    assert name == "a"
    assert schedule.failed == {"b": 1}
    assert phase(schedule, excess, step, regained=True)[1] == "a"


def test_a_domain_without_a_chance_and_one_trained_again_keep_their_claim():
    schedule = RecoverySchedule().start({"a": 2.0}, 100, LIMITS).abandon(101, LIMITS)
    assert (schedule.failures, schedule.failed) == (1, {})
    schedule, _, _ = phase(RecoverySchedule(), {"a": 2.0}, 1000, regained=False)
    assert schedule.failed == {"a": 1}
    assert schedule.trained("b") is schedule
    assert schedule.trained("a").failed == {}


def test_schedules_survive_json():
    schedule = RecoverySchedule().start({"a": 1.0}, 100, LIMITS).step(False, 101, LIMITS)
    again = RecoverySchedule(**schedule.state())
    assert repr(again) == repr(schedule)


class TestExpectedLength:
    @pytest.mark.parametrize("contraction", [0.3, 0.7, 0.95])
    def test_is_that_of_a_quadratic(self, contraction):
        # A quadratic damage that shrinks by the same factor at every step.
        loss, steps = 0.3, 0
        while loss > 0.01:
            loss, steps = loss * contraction, steps + 1
        assert math.ceil(expected_steps(1.0, contraction, 0.3, 0.01) - 1e-9) == steps

    def test_without_contraction_it_never_ends(self):
        assert expected_steps(1.0, 1.2, 0.3, 0.01) == math.inf

    def test_unknown_where_nothing_was_displaced(self):
        assert math.isnan(expected_steps(0.0, 0.0, 0.3, 0.01))
        assert math.isnan(expected_steps(1.0, 0.5, math.nan, 0.01))


ALONE = dataclasses.replace(
    CONFIG,
    project=False,
    recovery=True,
    recovery_budget=0.05,
    recovery_tolerance=0.025,
    recovery_steps=6,
    recovery_share=0.3,
)


PLAN = ["math"] * 40 + ["code"] * 40 + ["qa"] * 40


def run(config, seed):
    """Three domains in turn on the toy; recovery steps replace planned ones."""
    model, guard, optimizer = guarded(seed, config=config)
    own, trained = {}, []
    for step, planned in enumerate(PLAN):
        trained.append(guard.recovery or planned)
        train(model, guard, optimizer, trained[-1:], start=step)
        own[planned] = pass_rate(model, planned)
    return sum(own[name] - pass_rate(model, name) for name in ("math", "code")) / 2, guard, trained


@pytest.mark.parametrize("seed", range(3))
def test_recovery_alone_brings_back_what_was_lost(seed):
    lost, *_ = run(dataclasses.replace(ALONE, recovery=False), seed)
    kept, guard, trained = run(ALONE, seed)
    assert lost > 0.15, "the plain run must forget"
    assert kept < 0.5 * lost
    replaced = sum(found != planned for found, planned in zip(trained, PLAN, strict=True))
    assert 0 < replaced <= guard.schedule.total <= ALONE.recovery_share * len(trained)


def test_the_anchor_moves_only_when_the_reward_is_back():
    model, guard, optimizer = guarded(0, config=ALONE)
    train(model, guard, optimizer, ["math"] * 40)
    step = 40
    while guard.recovery is None:
        train(model, guard, optimizer, ["code"], start=step)
        step += 1
    state = guard.domains["math"]
    before, target, retained = state.model, state.target_reward, state.retained
    failing = 0
    while guard.recovery is not None:
        # A target out of reach: the phase must fail.
        state.target_reward = 10.0
        train(model, guard, optimizer, ["math"], start=step)
        assert state.anchored
        step, failing = step + 1, failing + 1
    assert failing == ALONE.recovery_steps
    assert guard.schedule.failures == 1
    state.target_reward = target
    train(model, guard, optimizer, ["code"], start=step)
    assert state.model is before
    assert state.retained is retained
    assert state.foreign_steps > 1
    while guard.recovery is None:
        step += 1
        train(model, guard, optimizer, ["code"], start=step)
    state.target_reward = -1.0
    train(model, guard, optimizer, ["math"], start=step + 1)
    assert guard.schedule.regained
    state.target_reward = target
    train(model, guard, optimizer, ["code"], start=step + 2)
    assert state.model is not before
    assert state.target_reward >= target


def test_the_old_anchor_predicts_the_same_while_its_domain_recovers():
    model, guard, optimizer = guarded(0, config=ALONE)
    train(model, guard, optimizer, ["math"] * 40)
    step = 40
    while guard.recovery is None:
        train(model, guard, optimizer, ["code"], start=step)
        step += 1
    here = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = guard.raw("math")
    train(model, guard, optimizer, ["math"] * 2, start=step)
    model.load_state_dict(here)
    assert guard.raw("math") == pytest.approx(before, rel=1e-5)


def test_monitoring_alone_is_bit_identical():
    models = []
    for config in (None, dataclasses.replace(CONFIG, project=False)):
        model, guard, optimizer = guarded(0, config=config or dataclasses.replace(CONFIG, enabled=False))
        train(model, guard, optimizer, ["math"] * 10 + ["code"] * 10)
        models.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*models, strict=True))
    assert math.isfinite(guard.predicted("math"))


def test_every_other_domain_is_protected_meanwhile():
    config = dataclasses.replace(ALONE, project=True)
    model, guard, optimizer = guarded(0, config=config)
    train(model, guard, optimizer, ["math"] * 40 + ["code"] * 5)
    guard.schedule = RecoverySchedule(phase="recovering", domain="math")
    with guard.domain("math"):
        assert guard.protected == ()
    train(model, guard, optimizer, ["math"], start=45)
    guard.begin({"math": 1.0})
    assert guard.protected == ("code",)
    state = guard.domains["code"]
    assert state.subspace.item() <= state.radius.item() * (1 + 1e-3)


@pytest.mark.parametrize("project", [True, False])
def test_a_domain_that_must_recover_is_held_closer(project):
    model, guard, optimizer = guarded(0, config=dataclasses.replace(ALONE, project=project))
    train(model, guard, optimizer, ["math"] * 40 + ["code"] * 5)
    state = guard.domains["math"]
    before = state.region.radius
    follow(guard, {"math": dataclasses.replace(guard.measure("math"), loss=1.0)})
    assert guard.recovery == "math"
    # Out of reach, so that the phase takes all its steps.
    state.target_reward = 10.0
    # A phase that its host cannot serve costs nobody a step, and changes nothing.
    assert (state.region.radius, state.region.ceiling) == (before, math.inf)
    train(model, guard, optimizer, ["math"], start=45)
    if not project:
        assert (state.region.radius, state.region.ceiling) == (before, math.inf)
        return
    assert state.region.radius == state.region.ceiling == state.radius.item() == before / 2
    # A phase's own steps leave it so; the domain's planned ones do not.
    train(model, guard, optimizer, ["math"], start=46)
    assert state.region.ceiling == before / 2
    guard.abandon_recovery()
    train(model, guard, optimizer, ["math"], start=47)
    assert state.region.ceiling == math.inf


@pytest.mark.parametrize("back", [True, False])
def test_a_phase_is_judged_where_one_generation_serves_all_its_steps(back):
    model, guard, optimizer = guarded(0, config=dataclasses.replace(ALONE, recovery_steps=2))
    train(model, guard, optimizer, ["math"] * 40)
    anchor = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = 40
    while guard.recovery is None:
        train(model, guard, optimizer, ["code"], start=step)
        step += 1
    rows = rollout(model, "math", 64, seed=9)
    for number in range(2):
        with guard.domain("math"):
            # All rollouts are of the weights before the phase, which had lost the domain.
            if number == 0:
                guard.retain("math", rows)
            policy_gradient(model, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            if back and number == 1:
                model.load_state_dict(anchor)
            guard.probe()
        assert (guard.recovery is None) == (number == 1)
    assert guard.schedule.regained == back
    assert guard.schedule.failures == (not back)


def recovering(config=ALONE):
    """The toy in the first step of a phase."""
    model, guard, optimizer = guarded(0, config=config)
    step = 0
    while guard.recovery is None:
        train(model, guard, optimizer, [PLAN[step]], start=step)
        step += 1
    return model, guard, optimizer, step


def test_a_phase_that_the_host_does_not_follow_is_given_up():
    model, guard, optimizer, step = recovering()
    before = guard.domains["math"].model
    train(model, guard, optimizer, ["code"] * PATIENCE, start=step)
    assert guard.recovery is None
    assert guard.schedule.failures == 1
    assert guard.domains["math"].model is before


def test_a_host_without_rows_can_give_a_phase_up():
    model, guard, optimizer, step = recovering()
    train(model, guard, optimizer, ["math"], start=step)
    guard.abandon_recovery()
    assert guard.recovery is None
    train(model, guard, optimizer, ["code"], start=step + 1)
    assert guard.domains["math"].anchored
    assert guard.domains["math"].foreign_steps > 1
    guard.abandon_recovery()
    assert guard.schedule.failures == 1


def test_a_phase_of_a_run_without_recovery_does_not_go_on(tmp_path):
    model, guard, _, _ = recovering()
    guard.save(tmp_path)
    other = Guard(model, dataclasses.replace(ALONE, recovery=False))
    other.load(tmp_path)
    assert other.recovery is None


def test_its_own_steps_do_not_move_its_radius():
    config = dataclasses.replace(ALONE, recovery_steps=50, recovery_share=1.0)
    model, guard, optimizer, _ = recovering(config)
    state = guard.domains["math"]
    radius, pairs = state.region.radius, state.region.xx
    for number in range(4):
        with guard.domain("math"):
            policy_gradient(model, rollout(model, "math", seed=number)).backward()
            optimizer.step()
            optimizer.zero_grad()
        guard.probe()
        guard.calibrate("math", 0.5)
    assert (state.region.radius, state.region.xx) == (radius, pairs)
    assert guard.schedule.taken == 4


@pytest.mark.parametrize("stop", [45, 51, 53, 56, 60])
def test_resume_inside_a_phase_is_exact(stop, tmp_path):
    def steps(model, guard, optimizer, first, last):
        for step in range(first, last):
            train(model, guard, optimizer, [guard.recovery or PLAN[step]], start=step)

    whole, guard, optimizer = guarded(0, config=ALONE)
    steps(whole, guard, optimizer, 0, stop)
    guard.save(tmp_path)
    frozen = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    moments = torch.load(_saved(optimizer, tmp_path), weights_only=True)
    steps(whole, guard, optimizer, stop, 80)
    assert guard.schedule.phases > 0
    again, other, second = guarded(0, config=ALONE)
    again.load_state_dict(frozen)
    second.load_state_dict(moments)
    other.load(tmp_path)
    steps(again, other, second, stop, 80)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert other.schedule.total == guard.schedule.total


def _saved(optimizer, folder):
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder / "optimizer.pt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"recovery_budget": 0.01, "recovery_tolerance": 0.02},
            r"recovery_tolerance=0.02 .*recovery budget, here 0.01",
        ),
        ({"recovery_budget": 0.05, "recovery_tolerance": 0.05}, r"recovery_tolerance=0.05 .*under the recovery"),
        ({"recovery_budget": -1.0}, "a number above 0, or None"),
        ({"recovery_steps": 0}, "an integer >= 1"),
        ({"recovery_cooldown": -1}, "an integer >= 0"),
        ({"recovery_share": 0.0}, "above 0 and at most 1"),
    ],
)
def test_settings_in_the_wrong_order_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GuardConfig(**settings)


def test_thresholds_follow_the_budget():
    assert GuardConfig(budget=0.02).recovery_threshold == pytest.approx(0.06)
    assert GuardConfig(budget=0.02, project=False).recovery_threshold == 0.02
    assert GuardConfig(budget=0.02, project=False, recovery_budget=0.01).regained_within == 0.005
    assert GuardConfig(budget=0.1, recovery_budget=0.05).regained_within == 0.025


class Together:
    """A reduction over two threads, each standing for a rank; a rank that is alone in it fails."""

    def __init__(self):
        self.barrier, self.given = threading.Barrier(2, timeout=30), {}

    def of(self, rank):
        def reduce(values, kind):
            self.given[rank] = values.clone()
            self.barrier.wait()
            stacked = torch.stack([self.given[0], self.given[1]])
            self.barrier.wait()
            return stacked.sum(0) if kind == "sum" else stacked.amax(0)

        return reduce


def test_ranks_agree_where_one_alone_has_seen_a_wrong_answer():
    together, found = Together(), {}
    # One after the other: both draw from the one global generator.
    guards = [recovering()[1] for _ in range(2)]

    def judge(rank):
        guard = guards[rank]
        guard.ranks.reduce = together.of(rank)
        state = guard.domains["math"]
        state.low, state.high = (0.0, 1.0) if rank == 0 else (1.0, 1.0)
        state.target_reward = 1.0
        state.rollouts.add(20.0 if rank == 0 else 32.0, 32)
        limits = RecoveryLimits.of(guard.config)
        regained, _ = _regained(guard, state, RecoverySchedule(), limits, None)
        found[rank] = (regained, state.span, state.region.truth_xy, state.region.truth_xx)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(judge, rank) for rank in (0, 1)]:
            done.result()
    assert found[0] == found[1]
    assert found[0][1] == (0.0, 1.0)
    assert not found[0][0]
