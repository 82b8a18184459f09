"""Numbers and verdicts of the pages on the commands and on the paper follow from the results."""

import json
from pathlib import Path

from interference_guard.trust_region import FLOOR, SURFACE

ROOT = Path(__file__).resolve().parents[2]


def results(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def test_cost_of_the_commands():
    page, found = (ROOT / "docs/cli.md").read_text(), results("tooling")
    for name in ("compare", "report"):
        item = found[name]
        numbers = (
            f"| {item['seconds']:.1f} s | {item['processor_seconds']:.1f} s | {item['peak_bytes'] / 1e9:.2f} GB"
        )
        assert numbers in page
    assert found["compare"]["parameters"] >= 1e9
    assert found["compare"]["peak_bytes"] < 2 * 2**30
    assert found["report"]["steps"] == 10_000
    assert found["report"]["seconds"] < 5
    assert f"page of {found['report']['page_bytes'] / 1e6:.1f} MB" in page


def test_surface_and_floor_are_those_of_the_code():
    page = (ROOT / "docs/concepts/trust_region.md").read_text()
    assert f"more than {SURFACE} of the radius" in page
    assert FLOOR == 1 / 16
    assert "a sixteenth of the largest radius" in page


def test_verdict_on_short_refreshes():
    phases = results("recovery")["summary"]["phases"]
    # The page says that some phases brought their domain back and others did not.
    assert 0 < phases["regained"] < phases["all"]
    assert "holds in part" in (ROOT / "docs/paper.md").read_text()


def short(value, digits=2):
    """As the page writes a number under 1: without its 0."""
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def percent(value):
    return f"{value:.0%}".replace("%", " %")


def test_numbers_of_the_paper():
    page, found = (ROOT / "docs/paper.md").read_text(), results("paper")
    plain, guarded = found["observed"], found["guarded"]
    pairs = [f"{short(run['average'], 3)} and" for run in (plain, guarded)]
    assert f"average {pairs[0]} mean forgetting {short(plain['forgetting'], 3)}; guarded {pairs[1]} " in page
    assert f"{pairs[1]} {short(guarded['forgetting'], 3)} | holds" in page
    for run in (plain, guarded):
        assert f"mean {short(run['edits']['top_neurons_jaccard']['mean'], 3)}" in page
    routes, mean = plain["routes"]["mean"], found["prediction"]["mean"]
    assert f"mean Jaccard index of {short(routes['overlap'])}" in page
    for text in (
        f"two updates {short(routes['shared_cosine'], 3)} on shared neurons",
        f"neurons and {short(routes['other_cosine'], 3)} on the others",
        f"{percent(mean['inside'])} of the predicted interference",
        f"{percent(mean['damage_of_top_1_percent_of_units'])} in the 1 % worst",
        f"measured loss is {short(mean['spearman_loss'])}, with KL {short(mean['spearman_kl'])}",
        f"cosine {short(mean['largest_cosine'], 3)} in the mean",
        f"but {short(mean['largest_cosine_at_random'], 3)} between random",
        f"{percent(mean['displacement_inside'])} of the next",
        f"would have {percent(mean['displacement_inside_if_flat'])}",
        f"{percent(mean['damage_in_shared_directions'])} of the interference",
    ):
        assert text in page, text
    for kind, row in found["rollback"]["mean"].items():
        cells = f"{short(row['regained'])} | {short(row['cost'])} | {row['average']:+.3f}".replace("+0.", "+.")
        reached = found["rollback"]["reached"][kind]
        assert f"| {cells} | {reached} of {found['rollback']['domains_that_lost']} |" in page, kind


def test_the_excess_in_bf16_is_the_result():
    page, found = (ROOT / "docs/concepts/projection.md").read_text(), results("precision")
    assert len(found["rows"]) == 10
    for row in found["rows"]:
        numbers = [row[kind]["mean"] for kind in ("fp32", "bf16, to the nearest", "bf16, at random")]
        cells = " | ".join(f"{max(number, 0):.3f}" for number in numbers)
        assert f"| {row['reach']} steps | {row['rate']:g} | {cells} |" in page
        assert max(abs(number) for number in row["fp32"]["seeds"]) < 1e-3
