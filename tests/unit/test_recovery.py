import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interference_guard import ConfigError, GuardConfig
from interference_guard.recovery import RecoveryLimits, RecoverySchedule, expected_steps

LIMITS = RecoveryLimits(steps=3, cooldown=4, share=0.25)
excesses = st.dictionaries(st.sampled_from("abc"), st.floats(0, 5), max_size=3)
walks = st.lists(st.tuples(excesses, st.booleans()), max_size=120)
limits = st.builds(
    RecoveryLimits, steps=st.integers(1, 6), cooldown=st.integers(0, 8), share=st.floats(0.01, 1.0)
)


def walk(inputs, limits, start=0, unit=1):
    """The schedules of a run; one input for every `unit` steps."""
    schedule, found = RecoverySchedule(), []
    for number, (excess, regained) in enumerate(inputs, 1):
        step = start + number * unit
        schedule = schedule.step(regained, step, limits, unit).start(excess, step, limits)
        found.append(schedule)
    return found


@given(walks, limits, st.integers(1, 5))
def test_no_input_passes_the_cap(inputs, limits, unit):
    whole = dataclasses.replace(limits, steps=-(-limits.steps // unit) * unit)
    for number, schedule in enumerate(walk(inputs, whole, unit=unit), 1):
        assert schedule.total <= limits.share * number * unit + 1e-9
        assert schedule.taken <= whole.steps


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
        # A quadratic loss that shrinks by the same factor at every step.
        loss, steps = 0.3, 0
        while loss > 0.01:
            loss, steps = loss * contraction, steps + 1
        assert math.ceil(expected_steps(1.0, contraction, 0.3, 0.01) - 1e-9) == steps

    def test_without_contraction_it_never_ends(self):
        assert expected_steps(1.0, 1.2, 0.3, 0.01) == math.inf

    def test_unknown_where_nothing_was_displaced(self):
        assert math.isnan(expected_steps(0.0, 0.0, 0.3, 0.01))
        assert math.isnan(expected_steps(1.0, 0.5, math.nan, 0.01))


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
