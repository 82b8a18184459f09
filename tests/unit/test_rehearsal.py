from collections import Counter

import pytest

from interference_guard import ConfigError
from interference_guard.rehearsal import Rehearsal, check_active_share, rehearsed_prompts


def test_parts_of_a_batch_have_the_same_share():
    names = Rehearsal(["math", "code", "qa"], ["math", "code", "qa"], prompts=32, share=0.25).batch(2)
    assert [names[start : start + 8].count("qa") for start in (0, 8, 16, 24)] == [6] * 4
    assert Counter(names) == {"qa": 24, "math": 4, "code": 4}


@pytest.mark.parametrize("prompts", [3, 4, 7, 16, 33])
@pytest.mark.parametrize("share", [0.3, 0.34, 0.36])
def test_the_share_is_met_to_a_whole_prompt(prompts, share):
    names = Rehearsal(["a", "b"], ["a", "b"], prompts, share).batch(1)
    assert len(names) == prompts
    assert names.count("a") == round(share * prompts)


def test_earlier_domains_take_turns_over_batches():
    domains = ["a", "b", "c", "d", "e", "f"]
    rehearsal = Rehearsal(["f"] * 20, domains, prompts=8, share=0.25)
    found = Counter(name for number in range(20) for name in rehearsal.batch(number))
    assert found == {"f": 120, **dict.fromkeys(domains[:5], 8)}


def test_the_first_domain_has_batches_of_its_own():
    assert Rehearsal(["a", "a", "b"], ["a", "b"], prompts=4, share=0.25).batch(1) == ["a"] * 4
    assert Rehearsal(["a", "b"], ["a", "b"], prompts=4, share=None).batch(1) == ["b"] * 4


@pytest.mark.parametrize("plan", [[], ["a", "a"]])
def test_there_must_be_a_domain_to_rehearse(plan):
    with pytest.raises(ConfigError, match="has no domain to rehearse"):
        Rehearsal(plan, ["a"], prompts=4, share=0.25)


@pytest.mark.parametrize("share", [-0.1, 0.5, 1, float("nan"), "0.25", True])
def test_shares_that_are_none(share):
    with pytest.raises(ConfigError, match=r"rehearsal=.* from 0 to below 0\.5"):
        rehearsed_prompts(share, 8)


@pytest.mark.parametrize(
    ("share", "prompts", "message"),
    [
        (0.1, 4, r"is 0 of a batch of 4 prompts\. .* Allowed here: from 0\.25 to 0\.25"),
        # Two of four: both would be in training, and nothing would be held.
        (0.4, 4, r"is 2 of a batch of 4 prompts\. .* less than half"),
        (0.3, 2, r"is 1 of a batch of 2 prompts\. .* none; take batches of 3 or more"),
    ],
)
def test_shares_that_whole_prompts_do_not_allow(share, prompts, message):
    with pytest.raises(ConfigError, match=message):
        rehearsed_prompts(share, prompts)


@pytest.mark.parametrize(
    ("share", "prompts", "part"), [(0.25, 4, 0.25), (0.25, 6, 1 / 3), (0, 8, 0), (None, 1, 0)]
)
def test_the_share_of_whole_prompts(share, prompts, part):
    assert rehearsed_prompts(share, prompts) / prompts == part


@pytest.mark.parametrize("active_share", [0.05, 0.3, 0.7])
def test_what_is_rehearsed_must_stay_protected(active_share):
    with pytest.raises(ConfigError, match=r"above 0\.333 and at most 0\.667; 0\.5 is always right"):
        check_active_share(0.25, 6, active_share)
    check_active_share(0.25, 6, 0.5)
    check_active_share(0.0, 6, active_share)
