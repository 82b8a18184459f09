"""Methods are tuned on one seed and compared on others, whatever a search finds on the way."""

from dataclasses import asdict
from itertools import pairwise

import pytest

from benchmarks import provenance
from benchmarks.bed import digits
from benchmarks.bed.beds import BEDS, DIGITS
from benchmarks.rivals.registry import RIVALS, Rival
from benchmarks.rivals.table import summarise
from benchmarks.rivals.tuning import FIRST, RATES, SEEDS, SHOWN, TUNING_SEED, Tuning, key

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


def tried(made, strength="weak"):
    return [run.rate for run in made if run.seed == TUNING_SEED and run.strength == strength]


def peak(rate):
    """A score that falls on both sides of a rate."""
    return lambda run: 1 - abs(RATES.index(run.rate) - RATES.index(rate)) / 10


@pytest.mark.parametrize("best", RATES)
def test_the_rate_climbs_to_where_both_neighbours_are_worse(best):
    made, chosen = search(peak(best))
    assert chosen == (best, "weak")
    low, high = sorted((FIRST, RATES.index(best)))
    assert sorted(tried(made)) == list(RATES[max(low - 1, 0) : high + 2])


def test_each_strength_has_a_rate_of_its_own():
    # The weak setting is best at a low rate, where the strong one is worse than it.
    scores = {("weak", 2e-4): 0.6, ("weak", 3e-4): 0.55, ("strong", 3e-4): 0.5, ("strong", 5e-4): 0.75}
    made, chosen = search(lambda run: scores.get((run.strength, run.rate), 0.1))
    assert chosen == (5e-4, "strong")
    assert 1e-3 in tried(made, "strong")
    assert 1e-3 not in tried(made, "weak")


def test_what_is_compared_has_other_seeds_and_both_orders():
    made, chosen = search(peak(2e-4))
    final = [run for run in made if run.seed != TUNING_SEED]
    assert {(run.seed, run.order) for run in final} == {(s, order) for s in SEEDS for order in DIGITS.orders}
    assert {(run.rate, run.strength) for run in final} == {chosen}
    assert TUNING_SEED not in SEEDS


def test_plain_training_is_compared_at_every_rate():
    made, _ = search(peak(1e-3), RIVALS["plain"], "plain")
    assert {run.rate for run in made if run.seed != TUNING_SEED} == {*SHOWN, 1e-3}


def test_an_edge_of_the_search_is_told():
    rival = Rival("made up", "nowhere:None", (1.0, 10.0, 100.0))
    tuning = Tuning("made up", rival, DIGITS, {})
    assert [tuning.at_edge(3e-4, strength) for strength in rival.strengths] == [True, False, True]
    assert tuning.at_edge(RATES[-1], 10.0)
    assert not Tuning("made up", RIVAL, DIGITS, {}).at_edge(3e-4, "weak")


def result(run, average):
    return {
        "run": asdict(run),
        "average": average,
        "forgetting": 0.1,
        "own": {"a": 0.5},
        "last": 0.5,
        "method_bytes": 7,
    }


def test_the_table_counts_the_runs_that_are_compared_alone():
    runs = []
    for name, final in (("mixed", 0.4), ("guard", 0.5)):
        made, _ = search(peak(3e-4), RIVALS[name], name)
        runs += [
            result(run, 0.9 if run.seed == TUNING_SEED else final + run.seed / 100 + 0.002 * (name == "guard"))
            for run in made
        ]
    summary = summarise(DIGITS, runs)
    guard, mixed = summary["rows"]
    assert (guard["method"], mixed["method"]) == ("guard", "mixed")
    assert mixed["runs"] == len(SEEDS) * 2
    assert mixed["average"] == pytest.approx(0.41)
    # Means of the seeds are .40, .41 and .42.
    assert mixed["standard_error"] == pytest.approx(0.01 / 3**0.5)
    assert mixed["guard_beyond"] == pytest.approx(0.102)
    assert mixed["guard_beyond_error"] == pytest.approx(0, abs=1e-12)
    assert mixed["rehearses"]
    assert not guard["rehearses"]
    assert summary["missing"]["plain"] is None
    assert "mixed" not in summary["missing"]


@pytest.mark.parametrize("bed", BEDS.values(), ids=BEDS)
def test_in_the_second_order_no_domain_keeps_its_place_or_its_neighbour(bed):
    first, second = bed.orders
    assert sorted(first) == sorted(second)
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert not set(pairwise(first)) & set(pairwise(second))


def test_digits_are_tested_on_numbers_that_are_never_trained():
    trained, tested = (
        {row["prompt"] for row in digits.rows("reverse", 20_000, 0, test=test)} for test in (False, True)
    )
    assert len(trained | tested) == 1000
    assert not trained & tested


@pytest.mark.parametrize(
    ("domain", "answer"),
    [
        ("reverse", "170"),
        ("differences", "361"),
        ("descending", "710"),
        ("running_sum", "078"),
        ("successor", "182"),
        ("mirror_sum", "141"),
        ("complement", "829"),
        ("neighbours", "781"),
    ],
)
def test_digits_have_the_right_answers(domain, answer):
    rows = {row["prompt"]: row["answer"] for row in digits.rows(domain, 8000, 0)}
    rows |= {row["prompt"]: row["answer"] for row in digits.rows(domain, 8000, 0, test=True)}
    assert rows[f"{domain} 071 ="] == answer


def test_runs_of_another_kind_of_machine_tune_and_are_not_compared():
    made, chosen = search(peak(2e-4), name="plain", rival=RIVALS["plain"])
    runs = [result(run, peak(2e-4)(run)) for run in made]
    there = summarise(DIGITS, runs)
    own = [run for run in runs if run["run"]["seed"] != TUNING_SEED]
    assert summarise(DIGITS, own)["rows"] == []
    assert summarise(DIGITS, own, elsewhere=runs) == there
    alone = summarise(DIGITS, [], elsewhere=runs)
    assert alone["rows"] == []
    assert alone["missing"]["plain"] == len(own)
    assert chosen is not None


def test_processors_of_two_makers_share_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_processor", lambda: "AMD EPYC")
    assert provenance.here("rivals", tmp_path) == "rivals"
    provenance.write("rivals", {}, tmp_path)
    assert provenance.here("rivals", tmp_path) == "rivals"
    monkeypatch.setattr(provenance, "_processor", lambda: "Intel(R) Xeon(R) Processor")
    assert provenance.here("rivals", tmp_path) == "rivals_intel"
    monkeypatch.setattr(provenance, "_processor", lambda: "")
    assert provenance.here("rivals", tmp_path) == "rivals_unknown"
