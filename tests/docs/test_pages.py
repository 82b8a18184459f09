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


def test_the_excess_in_bf16_is_the_result():
    page, found = (ROOT / "docs/concepts/projection.md").read_text(), results("precision")
    assert len(found["rows"]) == 10
    for row in found["rows"]:
        numbers = [row[kind]["mean"] for kind in ("fp32", "bf16, to the nearest", "bf16, at random")]
        cells = " | ".join(f"{max(number, 0):.3f}" for number in numbers)
        assert f"| {row['reach']} steps | {row['rate']:g} | {cells} |" in page
        assert max(abs(number) for number in row["fp32"]["seeds"]) < 1e-3
