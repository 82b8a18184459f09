"""How sensitive the guard is to budget, rate and probes: what the page on rivals says of it is the results."""

import json
from pathlib import Path
from statistics import fmean

from benchmarks import ablations

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/research.md").read_text()


def rows_of(name):
    """Rows of a results file with six runs of each setting, which follow from its runs."""
    found = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert json.loads(json.dumps(ablations.summarise(found["runs"]))) == found["rows"]
    assert {row["runs"] for row in found["rows"]} == {6}
    return found["rows"]


def test_measuring_less_often_forgets_less_on_the_other_bed_too():
    rows = rows_of("ablations_gym_amd")
    assert ablations.markdown(rows) in PAGE
    default, seldom, less, more = rows
    assert f"end at {default['average']:.3f} there and forget {default['forgetting']:.3f}" in PAGE
    assert max(seldom["more_forgotten"]) < 0
    # Level: within a third of what changes from run to run.
    assert abs(fmean(seldom["differences"])) < 0.01
    averages = [row["average"] for row in (less, default, more)]
    assert f"range of the budget the average changes by {max(averages) - min(averages):.3f}" in PAGE
    lost = "{:.3f}, {:.3f} and {:.3f}".format(*(row["forgetting"] for row in (less, default, more)))
    assert f"what is forgotten follows it: {lost}" in PAGE
    rates = {7e-4: default}
    for rate in (4e-4, 1.2e-3):
        (rates[rate],) = rows_of(f"ablations_gym_{rate:g}")
    low, usual, high = (rates[rate]["average"] for rate in sorted(rates))
    assert f"range of the learning rate it changes by {usual - low:.3f}" in PAGE
    assert f"at 4e-4 it is {low:.3f}, at 7e-4 {usual:.3f} and at 1.2e-3 {high:.3f}" in PAGE
    lost = [row["forgetting"] for row in rates.values()]
    assert f"Forgetting stays between {min(lost):.3f} and {max(lost):.3f}" in PAGE
    assert low < high < usual
    assert rates[4e-4]["own"] < default["own"]


def test_neither_budget_nor_rate_matters_much_on_digits():
    rows = rows_of("ablations_digits_budget")
    assert ablations.markdown(rows) in PAGE
    default, less, more = rows
    assert f"end at {default['average']:.3f} and forget {default['forgetting']:.3f} on this machine" in PAGE
    averages = [row["average"] for row in (less, default, more)]
    assert f"by {max(averages) - min(averages):.3f} over a fivefold range of the budget" in PAGE
    lost = "{:.3f}, {:.3f} and {:.3f}".format(*(row["forgetting"] for row in (less, default, more)))
    assert f"and {lost} is forgotten" in PAGE
    rates = {5e-4: default}
    for rate in (3e-4, 9e-4):
        (rates[rate],) = rows_of(f"ablations_digits_{rate:g}")
    averages = [rates[rate]["average"] for rate in sorted(rates)]
    assert f"by {max(averages) - min(averages):.3f} over a threefold range of the rate" in PAGE
    assert "at 3e-4 it is {:.3f}, at 5e-4 {:.3f} and at 9e-4 {:.3f}".format(*averages) in PAGE
    high = rates[9e-4]
    text = f"reach {high['own']:.3f} in their own phases in place of {default['own']:.3f}"
    assert f"{text}, and {high['forgetting']:.3f} is forgotten" in PAGE
