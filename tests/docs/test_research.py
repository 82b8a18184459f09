"""The tables of the page on rivals are the committed results, of runs that no method was tuned on."""

import json
from pathlib import Path

import pytest

from benchmarks.bed.beds import BEDS
from benchmarks.rivals.registry import RIVALS
from benchmarks.rivals.table import markdown, summarise
from benchmarks.rivals.tuning import SEEDS, TUNING_SEED

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/research.md").read_text()
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


def test_the_page_names_every_method():
    for name in RIVALS:
        assert name.partition(",")[0] in PAGE
