from collections import Counter

import pytest

from interference_guard import ConfigError
from interference_guard.rehearsal import batch_domains, check_active_share, check_rehearsal


def test_parts_of_a_batch_have_the_same_share():
    names = batch_domains("qa", ["math", "code"], number=3, prompts=32, share=0.25)
    assert [names[start : start + 8].count("qa") for start in (0, 8, 16, 24)] == [6] * 4
    assert Counter(names) == {"qa": 24, "math": 4, "code": 4}


@pytest.mark.parametrize("prompts", [2, 3, 7, 16, 33])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.49])
def test_the_share_is_met_to_a_whole_prompt(prompts, share):
    names = batch_domains("b", ["a"], number=0, prompts=prompts, share=share)
    assert len(names) == prompts
    assert names.count("a") == round(share * prompts)


def test_earlier_domains_take_turns_over_batches():
    earlier = ["a", "b", "c", "d", "e"]
    found = Counter(
        name for number in range(20) for name in batch_domains("f", earlier, number, prompts=8, share=0.25)
    )
    assert found == {"f": 120, **dict.fromkeys(earlier, 8)}


def test_the_first_domain_has_batches_of_its_own():
    assert batch_domains("a", [], number=5, prompts=4, share=0.4) == ["a"] * 4
    assert batch_domains("b", ["a"], number=5, prompts=4, share=0.0) == ["b"] * 4


@pytest.mark.parametrize("share", [-0.1, 0.5, 1, float("nan"), "0.25", True, None])
def test_shares_that_are_none(share):
    with pytest.raises(ConfigError, match=r"rehearsal=.* from 0 to below 0\.5"):
        check_rehearsal(share, 8)


def test_less_than_a_prompt_is_refused():
    with pytest.raises(ConfigError, match=r"one of a batch of 4 prompts\. Take 0\.25 or more"):
        check_rehearsal(0.1, 4)
    check_rehearsal(0.25, 4)
    check_rehearsal(0, 1)


@pytest.mark.parametrize("active_share", [0.05, 0.25, 0.8])
def test_what_is_rehearsed_must_stay_protected(active_share):
    with pytest.raises(ConfigError, match=r"above 0\.25 and at most 0\.75"):
        check_active_share(0.25, active_share)
    check_active_share(0.25, 0.5)
    check_active_share(0.0, active_share)
