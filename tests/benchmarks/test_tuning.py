"""Methods are tuned on one seed and compared on others, whatever a search finds on the way."""

from dataclasses import asdict
from itertools import pairwise

import pytest

from benchmarks.bed.beds import BEDS, DIGITS
from benchmarks.rivals.registry import RIVALS, Rival
from benchmarks.rivals.table import summarise
from benchmarks.rivals.tuning import MIDDLE, RATES, SEEDS, TUNING_SEED, Tuning, key

RIVAL = Rival("made up", "nowhere:None", ("weak", "strong"))


def search(score, rival=RIVAL, name="made up"):
    """Make every run that is asked for, until none is; the runs in their order, and what was chosen."""
    found, made = {}, []
    while True:
        needed, chosen = Tuning(name, rival, DIGITS, found).needed()
        if not needed:
            return made, chosen
        made += needed
        found |= {key(asdict(run)): score(run) for run in needed}


def tried(made):
    return [(run.rate, run.strength) for run in made if run.seed == TUNING_SEED]


def test_the_rate_is_tuned_first_and_then_the_strength_at_it():
    made, chosen = search(lambda run: (run.rate == 2e-4) + (run.strength == "weak"))
    assert chosen == (2e-4, "weak")
    assert tried(made) == [*((rate, "weak") for rate in MIDDLE), (2e-4, "strong")]


@pytest.mark.parametrize(("best", "beyond"), [(RATES[0], RATES[0]), (RATES[-1], RATES[-1])])
def test_a_rate_at_the_edge_is_left_behind(best, beyond):
    made, chosen = search(lambda run: 1 - abs(RATES.index(run.rate) - RATES.index(best)) / 10)
    assert chosen == (beyond, "weak")
    # The other edge's neighbour lost, so it was not tried.
    assert {rate for rate, _ in tried(made)} == {*MIDDLE, beyond}


def test_another_strength_is_tried_at_the_rates_beside():
    made, chosen = search(
        lambda run: {"weak": {3e-4: 0.5}, "strong": {3e-4: 0.6, 5e-4: 0.7}}[run.strength].get(run.rate, 0)
    )
    assert chosen == (5e-4, "strong")
    assert (1e-3, "strong") in tried(made)


def test_what_is_compared_has_other_seeds_and_both_orders():
    made, chosen = search(lambda run: run.rate)
    final = [run for run in made if run.seed != TUNING_SEED]
    assert {(run.seed, run.order) for run in final} == {(s, order) for s in SEEDS for order in DIGITS.orders}
    assert {(run.rate, run.strength) for run in final} == {chosen}
    assert TUNING_SEED not in SEEDS


def test_plain_training_is_compared_at_every_rate():
    made, _ = search(lambda run: 0.5, RIVALS["plain"], "plain")
    assert {run.rate for run in made if run.seed != TUNING_SEED} == set(MIDDLE)


def test_the_table_counts_the_runs_that_are_compared_alone():
    made, _ = search(lambda run: 0.9 if run.seed == TUNING_SEED else 0.4, RIVALS["mixed"], "mixed")
    runs = [
        {
            "run": asdict(run),
            "average": 0.9 if run.seed == TUNING_SEED else 0.4,
            "forgetting": 0.1,
            "own": {"a": 0.5},
            "last": 0.5,
            "seconds": 10.0,
            "method_seconds": 2.0,
            "method_bytes": 7,
        }
        for run in made
    ]
    summary = summarise(DIGITS, runs)
    (row,) = summary["rows"]
    assert row["method"] == "mixed"
    assert row["runs"] == len(SEEDS) * 2
    assert row["average"] == pytest.approx(0.4)
    assert row["method_share"] == pytest.approx(0.25)
    assert summary["missing"]["plain"] is None
    assert "mixed" not in summary["missing"]


@pytest.mark.parametrize("bed", BEDS.values(), ids=BEDS)
def test_in_the_second_order_no_domain_keeps_its_place_or_its_neighbour(bed):
    first, second = bed.orders
    assert sorted(first) == sorted(second)
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert not set(pairwise(first)) & set(pairwise(second))
