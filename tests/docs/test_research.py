"""The tables of the page on rivals are the committed results, of runs that no method was tuned on."""

import json
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks import ablations, tables, width
from benchmarks.bed.beds import BEDS
from benchmarks.rivals import cost
from benchmarks.rivals.registry import RIVALS
from benchmarks.rivals.table import markdown, summarise
from benchmarks.rivals.tuning import SEEDS, TUNING_SEED

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/research.md").read_text()
ABLATIONS = json.loads((ROOT / "benchmarks/results/ablations_digits.json").read_text())
MOVED_ON = ("gym", "gym_0.001")
FOUND = {
    name: json.loads(path.read_text())
    for name in BEDS
    if (path := ROOT / f"benchmarks/results/rivals_{name}.json").is_file()
}


@pytest.mark.parametrize("bed", FOUND)
def test_the_table_is_the_result(bed):
    assert markdown(FOUND[bed]["summary"]) in PAGE


@pytest.mark.parametrize("bed", FOUND)
def test_the_summary_follows_from_the_runs(bed):
    again = json.loads(json.dumps(summarise(BEDS[bed], FOUND[bed]["runs"])))
    assert again == FOUND[bed]["summary"]


@pytest.mark.parametrize("bed", FOUND)
def test_every_row_has_all_its_runs(bed):
    runs = len(SEEDS) * len(BEDS[bed].orders)
    assert {row["runs"] for row in FOUND[bed]["summary"]["rows"]} == {runs}
    assert all(run["run"]["seed"] in (*SEEDS, TUNING_SEED) for run in FOUND[bed]["runs"])


def test_the_table_of_the_metric_is_the_result():
    runs = json.loads((ROOT / "benchmarks/results/ablations_digits_metric.json").read_text())["runs"]
    cells = {
        (run["variant"], run["run"]["seed"], run["order"]): f"{run['average']:.3f}, {run['forgetting']:.3f}"
        for run in runs
    }
    for seed in SEEDS:
        for order, word in enumerate(("first", "second")):
            pair = (cells[name, seed, order].replace("0.", ".") for name in ("default", "gradient metric"))
            assert f"| {seed}, {word} | {' | '.join(pair)} |" in PAGE
    default = [run for run in runs if run["variant"] == "default" and run["run"]["seed"] in SEEDS]
    final, lost = (fmean(run[key] for run in default) for key in ("average", "forgetting"))
    assert f"the six runs end at {final:.3f} and forget {lost:.3f}" in PAGE


def test_the_table_of_moved_regions_is_the_result():
    results = [json.loads((ROOT / f"benchmarks/results/ablations_{bed}.json").read_text()) for bed in MOVED_ON]
    cells = {
        (run["variant"], run["run"]["seed"], run["order"]): (run["average"], run["forgetting"])
        for found in results
        for run in found["runs"]
    }
    assert [{run["run"]["rate"] for run in found["runs"]} for found in results] == [{7e-4}, {1e-3}]
    columns = ("default", "no renewal", "budget 0.01", "budget 0.01, no renewal")
    places = [(seed, order) for seed in SEEDS for order in range(2)]

    def row(label, pairs):
        texts = [f"{final:.3f}, {lost:.3f}".replace("0.", ".") for final, lost in pairs]
        return f"| {label} | {' | '.join(texts)} |"

    for seed, order in places:
        pairs = (cells[name, seed, order] for name in columns)
        assert row(f"{seed}, {('first', 'second')[order]}", pairs) in PAGE
    means = [[fmean(cells[(name, *place)][key] for place in places) for key in range(2)] for name in columns]
    assert row("mean", means) in PAGE
    (_, _, with_it, without) = means
    assert f"ends {with_it[0] - without[0]:.3f} higher and forgets {without[1] - with_it[1]:.3f} less" in PAGE


def test_the_settings_tried_on_another_processor_are_the_result():
    found = json.loads((ROOT / "benchmarks/results/ablations_digits_amd.json").read_text())
    assert json.loads(json.dumps(ablations.summarise(found["runs"]))) == found["rows"]
    assert ablations.markdown(found["rows"]) in PAGE
    rows = {row["variant"]: row for row in found["rows"]}
    default = rows["default"]
    assert default["runs"] == rows["probe every 50"]["runs"] == 6
    assert f"end at {default['average']:.3f} there and forget {default['forgetting']:.3f}" in PAGE
    seldom = [fmean(rows["probe every 50"][key]) for key in ("differences", "more_forgotten")]
    assert f"{-seldom[0]:.3f} lower in the average and forgets {-seldom[1]:.3f} less" in PAGE
    energy, edited, drawn = (
        [fmean(rows[name][key]) for key in ("differences", "more_forgotten")]
        for name in ("coverage 0.5", "coverage 0.5 by edits", "coverage 0.5 at random")
    )
    # No worse by more than half of what changes from run to run.
    assert all(abs(a - b) < 0.015 for other in (edited, drawn) for a, b in zip(energy, other, strict=True))


def test_a_wider_policy_is_the_result():
    found = json.loads((ROOT / "benchmarks/results/width.json").read_text())
    rows = width.summarise(found["runs"], (0, 1, 2))
    assert json.loads(json.dumps(rows)) == found["summary"]
    assert tables.markdown(width.HEAD, width.cells(rows)) in PAGE
    plain, guard, mixed = (next(row for row in rows if row["method"] == name) for name in width.RATES)
    beyond = [row["guard_beyond"] for row in (plain, mixed)]
    errors = " and ".join(f"{row['guard_beyond_error']:.3f}" for row in (plain, mixed))
    assert f"ends {beyond[0]:.3f} above plain training and {-beyond[1]:.3f} below mixed**" in PAGE
    assert f"standard errors of the paired differences of {errors}" in PAGE
    assert f"{guard['own']:.3f}; the rest is forgotten afterwards, {guard['forgetting']:.3f}" in PAGE
    assert f"{guard['own']:.3f}" == f"{mixed['own']:.3f}"
    gym, narrow = tuned("gym"), best_plain("gym")
    assert f"it is [{narrow['guard_beyond']:.3f} and {-gym['mixed']['guard_beyond']:.3f}](#gym)" in PAGE
    assert f"the first two are {beyond[0]:.3f} and {-beyond[1]:.3f}." in (ROOT / "README.md").read_text()
    for row in rows:
        rates = width.RATES[row["method"]]
        assert min(rates) < row["rate"] < max(rates), "both neighbours were tried"
    assert guard["rate"] < gym["guard"]["rate"]
    assert mixed["rate"] < gym["mixed"]["rate"]
    assert f"than at width 64 ({gym['guard']['rate']} and {gym['mixed']['rate']})" in PAGE


def test_the_table_of_ablations_is_the_result():
    assert json.loads(json.dumps(ablations.summarise(ABLATIONS["runs"]))) == ABLATIONS["rows"]
    assert ablations.markdown(ABLATIONS["rows"]) in PAGE
    rows = {row["variant"]: row for row in ABLATIONS["rows"]}
    assert list(rows) == list(ablations.VARIANTS)
    runs = {row["runs"] for row in rows.values()}
    assert runs == {2}
    default = rows["default"]
    assert f"end at {default['average']:.3f} and forget {default['forgetting']:.3f}" in PAGE
    final = {name: fmean(row["differences"]) for name, row in rows.items()}
    lost = {name: fmean(row["more_forgotten"]) for name, row in rows.items()}
    assert f"forgets {lost['coverage 0.8']:.3f} more" in PAGE
    budgets = [final[name] for name in rows if name in ("budget 0.005", "budget 0.01", "budget 0.05")]
    assert f"moves by {max(map(abs, budgets)):.3f} at most" in PAGE
    assert (
        f"with 0.05 {lost['budget 0.05']:.3f} more is forgotten, and with 0.15 {lost['budget 0.15']:.3f}" in PAGE
    )
    assert f"worth {-min(rows['no renewal']['differences']):.3f} in one of the two runs" in PAGE
    assert min(rows["probe every 50"]["differences"]) >= 0 > max(rows["probe every 5"]["differences"])
    small = (
        "rank 4",
        "rank 8",
        "rank 32",
        "half-life 10",
        "half-life 250",
        "retain 32",
        "retain 64",
        "retain 256",
    )
    small += (
        "one sweep",
        "gradient metric",
        "measured in nats",
        "measured in nats, 0.03",
        "softened Gauss-Newton",
    )
    assert all(abs(final[name]) < 0.03 for name in small)


def other_machine(bed):
    """Rows of the table of another processor, by method."""
    found = json.loads((ROOT / f"benchmarks/results/rivals_{bed}_intel.json").read_text())
    again = summarise(BEDS[bed], found["runs"], elsewhere=FOUND[bed]["runs"])
    assert json.loads(json.dumps(again)) == found["summary"]
    assert found["made_with"]["processor"] != FOUND[bed]["made_with"]["processor"]
    assert markdown(found["summary"]) in PAGE
    rows = {row["method"]: row for row in found["summary"]["rows"]}
    assert {row["runs"] for row in rows.values()} == {6}
    return rows


def assert_recovery_alone(row, digits):
    text = f"end {row['guard_beyond']:.3f} below the guard, with a standard error of"
    assert f"{text} {row['guard_beyond_error']:.{digits}f}, and forget {row['forgetting']:.3f}" in PAGE


def test_what_earlier_rows_bring_is_the_result():
    rows = other_machine("digits")
    both, beside, guard = rows["guard, both"], rows["guard, replay"], rows["guard"]
    text = f"it is {beside['guard_beyond']:.3f} below the guard alone, with a standard error of"
    assert f"{text} {beside['guard_beyond_error']:.3f}" in PAGE
    assert (
        f"gain {-beside['forgetting']:.3f} after their own phases in place of losing {guard['forgetting']:.3f}"
        in PAGE
    )
    assert f"reaches {beside['own']:.3f} in place of {guard['own']:.3f}" in PAGE
    assert f"ends {both['guard_beyond']:.3f} below the guard alone, and forgets {both['forgetting']:.3f}" in PAGE
    assert_recovery_alone(rows["guard, recovery alone"], 3)
    agem, there = rows["A-GEM"], tuned("digits")["A-GEM"]["guard_beyond"]
    text = f"ends {agem['guard_beyond']:.3f} below the guard, with a standard error of"
    text = f"{text} {agem['guard_beyond_error']:.3f}, and forgets {agem['forgetting']:.3f}"
    assert f"{text}; on the other machine it ended {there:.3f} below" in PAGE
    above = {name: -rows[name]["guard_beyond"] for name in ("replay", "mixed")}
    assert f"is {above['replay']:.3f} above it here, and mixed training {above['mixed']:.3f}" in PAGE
    page = (ROOT / "docs/concepts/rehearsal.md").read_text()
    for bed, found in (("digits", rows), ("gym", other_machine("gym"))):
        for name, label in (
            ("guard", "guard"),
            ("guard, replay", "guard, rehearsing"),
            ("replay", "replay, no guard"),
        ):
            row = found[name]
            share = "" if name == "guard" else f"{row['strength']:.0%}"
            numbers = " | ".join(f"{row[key]:.3f}" for key in ("average", "own", "forgetting"))
            assert f"| {bed} | {label} | {share} | {numbers} |" in page


def test_the_table_of_another_processor_is_the_result():
    rows = other_machine("gym")
    beside, both = rows["guard, replay"], rows["guard, both"]
    text = (
        f"end {beside['guard_beyond']:.3f} below it, with a standard error of {beside['guard_beyond_error']:.3f}"
    )
    assert f"{text}, and recovery behind a looser projection {both['guard_beyond']:.3f}" in PAGE
    assert f"gain {-beside['forgetting']:.3f} after their own phases, but" in PAGE
    assert f"{beside['own']:.3f} in place of {rows['guard']['own']:.3f}" in PAGE
    assert f"ends {rows['replay']['guard_beyond']:.3f} below the guard here, and mixed training" in PAGE
    assert f"control of PEFT's OSF, ends {rows['plain, a trainer each']['guard_beyond']:.3f} below" in PAGE
    assert_recovery_alone(rows["guard, recovery alone"], 4)
    ewc, osft, guard = rows["EWC"], rows["OSFT-like"], rows["guard"]
    text = f"{ewc['guard_beyond']:.3f} below the guard with a standard error of {ewc['guard_beyond_error']:.3f}"
    assert f"{text}, and forgets {ewc['forgetting']:.3f}" in PAGE
    agem, there = rows["A-GEM"], tuned("gym")["A-GEM"]["guard_beyond"]
    text = f"A-GEM ends {agem['guard_beyond']:.3f} below it, with {agem['guard_beyond_error']:.3f}"
    assert f"{text}, and forgets {agem['forgetting']:.3f} too; on the other machine it ended {there:.3f}" in PAGE
    own = [name for name, row in rows.items() if not row["rehearses"] and not name.startswith("guard")]
    assert sorted(sorted(own, key=lambda name: rows[name]["guard_beyond"])[:2]) == ["A-GEM", "EWC"]
    assert osft["forgetting"] <= guard["forgetting"] + 0.001
    assert f"{osft['forgetting']:.3f}, and ends {osft['guard_beyond']:.3f} below it" in PAGE
    assert f"reach {osft['own']:.3f} in their own phases, the guard's {guard['own']:.3f}" in PAGE
    below = {name: row["guard_beyond"] for name, row in rows.items()}
    text = f"Random subspaces end {below['random subspace']:.3f} below the guard, KL {below['KL']:.3f}"
    assert f"{text}**, and PEFT's OSF {below['OSF']:.3f}" in PAGE
    plain = max(row["average"] for row in FOUND["gym"]["summary"]["rows"] if row["method"] == "plain")
    margin = tuned("gym")["guard"]["average"] - plain
    assert all(below[name] > margin for name in ("random subspace", "KL", "OSF"))
    assert f"The guard ends at {guard['average']:.3f} and forgets {guard['forgetting']:.3f} here" in PAGE


def test_the_table_of_costs_is_the_result():
    found = json.loads((ROOT / "benchmarks/results/rivals_digits_cost.json").read_text())
    assert cost.summarise(found["runs"]) == found["methods"]
    assert tables.markdown(cost.HEAD, cost.cells(found["methods"])) in PAGE
    # Each of the figure's methods has both: where it ends, and what it takes.
    assert set(tuned("digits")) == set(found["methods"])
    control = found["methods"]["plain"]["ratios"]
    assert f"came out at {min(control):.2f} and {max(control):.2f}" in PAGE
    assert (ROOT / "docs/rivals_digits.png").is_file()
    runs = [
        run for run in FOUND["digits"]["runs"] if run["run"]["method"] == "guard" and run["run"]["seed"] in SEEDS
    ]
    share = fmean(run["method_seconds"] / (run["seconds"] - run["method_seconds"]) for run in runs)
    assert f"its own clock shows {share:.1%} of the rest" in PAGE


def test_the_page_names_every_method():
    for name in RIVALS:
        assert name.partition(",")[0] in PAGE


def tuned(bed):
    return {row["method"]: row for row in FOUND[bed]["summary"]["rows"] if row["tuned"]}


def best_plain(bed):
    rows = [row for row in FOUND[bed]["summary"]["rows"] if row["method"] == "plain"]
    return max(rows, key=lambda row: row["average"])


def test_the_readme_quotes_both_beds():
    readme = (ROOT / "README.md").read_text()
    for bed, before in (("gym", "on these tasks the guard ends "), ("digits", "on the same inputs, ")):
        plain, mixed = best_plain(bed)["guard_beyond"], -tuned(bed)["mixed"]["guard_beyond"]
        assert f"{before}{plain:.3f} above plain training and {mixed:.3f} below mixed" in readme
    below = " and ".join(f"{tuned(bed)['A-GEM']['guard_beyond']:.3f}" for bed in ("gym", "digits"))
    assert f"A-GEM, the best of the methods run there that train no earlier rows, ends {below} below it" in readme
    for bed in FOUND:
        sequential = [row for row in FOUND[bed]["summary"]["rows"] if not row["rehearses"]]
        rivals = [row for row in sequential if not row["method"].startswith("guard")]
        assert max(rivals, key=lambda row: row["average"])["method"] == "A-GEM"
    digits = tuned("digits")
    errors = " and ".join(f"{digits[name]['guard_beyond_error']:.3f}" for name in ("plain", "mixed"))
    assert f"the paired differences have standard errors of {errors}" in PAGE
    assert f"**It forgets {digits['guard']['forgetting']:.3f}**, with the default budget" in PAGE
    agem = digits["A-GEM"]
    assert f"({agem['average']:.3f}, {agem['guard_beyond']:.3f} below, with a standard error of" in PAGE


def test_the_page_quotes_the_gym():
    rows, best = tuned("gym"), best_plain("gym")
    for bed in ("gym", "digits"):
        missing = "; ".join(FOUND[bed]["summary"]["missing"])
        assert f"Not run on this bed's machine: {missing}." in PAGE
    assert f"The guard ends {best['guard_beyond']:.3f} above plain training" in PAGE
    assert f"({best['rate']:g}), and {rows['plain']['guard_beyond']:.3f} above the rate that tuning chose" in PAGE
    assert f"A-GEM is {rows['A-GEM']['guard_beyond']:.3f} below it" in PAGE
    assert f"{-rows['replay']['guard_beyond']:.3f} above the guard, and mixed training" in PAGE
    assert f"**It forgets {rows['guard']['forgetting']:.3f}**" in PAGE
    tried = FOUND["gym"]["summary"]["tuning"]["guard"]
    near = [average for rate, budget, average in tried if 3e-4 <= rate <= 1e-3 and budget <= 0.05]
    assert len(near) == 9
    assert f"between {min(near):.3f} and {max(near):.3f} from 3e-4 to 1e-3" in PAGE


def test_what_protection_can_reach_follows_from_the_runs():
    below = []
    above = []
    for bed in ("gym", "digits"):
        runs = [run for run in FOUND[bed]["runs"] if run["run"]["seed"] in SEEDS]
        own = {}
        for run in runs:
            if run["run"]["method"] == "plain":
                for domain, rate in run["own"].items():
                    own.setdefault(domain, {}).setdefault(run["run"]["rate"], []).append(rate)
        bound = fmean(max(fmean(rates) for rates in by_rate.values()) for by_rate in own.values())
        guard, mixed = tuned(bed)["guard"], tuned(bed)["mixed"]
        numbers = (bound, guard["own"], guard["average"], mixed["average"])
        assert f"| {bed} | {' | '.join(f'{number:.3f}' for number in numbers)} |" in PAGE
        below.append(bound - guard["average"])
        above.append(bound - mixed["average"])
        assert guard["own"] - guard["average"] < 0.5 * below[-1]
    runs = [run for run in FOUND["digits"]["runs"] if run["run"]["seed"] in SEEDS]
    places = {}
    for run in runs:
        by_rate = places.setdefault(run["run"]["method"], {}).setdefault(run["run"]["rate"], [])
        by_rate.append([run["own"][domain] for domain in run["run"]["order"]])
    means = {
        name: [[fmean(column) for column in zip(*rows, strict=True)] for rows in by_rate.values()]
        for name, by_rate in places.items()
        if name in ("plain", "guard")
    }
    first, *later = (
        max(column) - own for column, own in zip(zip(*means["plain"], strict=True), *means["guard"], strict=True)
    )
    assert f"the first domain loses {first:.3f} and the later ones {min(later):.3f} to {max(later):.3f}" in PAGE
    assert f"stays {below[0]:.3f} and {below[1]:.3f} below the bound" in PAGE
    assert f"ends {above[0]:.3f} above mixed training on `gym` and {above[1]:.3f} on `digits`" in PAGE


def test_the_page_quotes_what_tuning_found():
    tried = FOUND["digits"]["summary"]["tuning"]
    guard = {(rate, budget): average for rate, budget, average in tried["guard"]}
    near = [average for (rate, budget), average in guard.items() if 2e-4 <= rate <= 5e-4 and budget <= 0.05]
    assert len(near) == 9
    assert f"between {min(near):.3f} and {max(near):.3f}" in PAGE
    assert f"At 1e-3 with a budget of 0.01 it is {guard[1e-3, 0.01]:.3f}" in PAGE
    assert f"with 0.1 at 5e-4 {guard[5e-4, 0.1]:.3f}" in PAGE
    plain = {rate: average for rate, _, average in tried["plain"]}
    assert f"falls from {plain[1e-4]:.3f} to {plain[5e-4]:.3f}" in PAGE
