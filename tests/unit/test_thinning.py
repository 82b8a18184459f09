from collections import Counter

import pytest

from interference_guard.thinning import active_of, edges, halved, has_phases


def lines(order):
    return [{"step": step, "active": [name]} for step, name in enumerate(order, 1)]


def evaluations(order, names="m"):
    return [{**line, "rewards": dict.fromkeys(names, 0.5)} for line in lines(order)]


def steps(found):
    return [line["step"] for line in found]


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ["a", "ab", "abc", "abcd", "aabb"])
def test_domains_that_take_turns_keep_like_parts(order, rounds):
    found = lines(order * 64)
    for _ in range(rounds):
        found = halved(found)
        assert found[-1]["step"] == 64 * len(order)
    counts = Counter(active_of(line) for line in found)
    assert len(counts) == len(set(order))
    assert max(counts.values()) - min(counts.values()) <= 2


def test_both_sides_of_a_change_stay():
    found = lines("a" * 50 + "b" * 51 + "c" * 50)
    for _ in range(5):
        found = halved(found)
    assert {50, 51, 101, 102} <= set(steps(found))
    assert len(found) < 12


def test_evaluations_at_the_ends_stay_also_of_domains_evaluated_apart():
    found = sorted(
        [*evaluations("a" * 20 + "b" * 20, "m"), *evaluations("a" * 20 + "b" * 20, "n")],
        key=lambda line: line["step"],
    )
    for _ in range(4):
        found = halved(found)
    for name in "mn":
        assert {1, 20, 21, 40} <= {line["step"] for line in found if name in line["rewards"]}


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("order", ["a", "ab", "abc"])
def test_the_length_falls(order, count):
    found = halved(lines((order * 8)[:count]))
    assert len(found) <= max(count - 1, 1) if count != 2 else len(found) <= 2
    assert steps(found)[-1:] == ([count] if count else [])


def test_edges_of_a_run_without_changes():
    assert edges(lines("aaaa")) == set()
    assert has_phases([])
