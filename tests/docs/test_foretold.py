"""What the page on rivals says of how a loss is foretold, and of what a probe is made of, is the results."""

import json
from pathlib import Path

from benchmarks import prediction, retained, tables

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/research.md").read_text()


def test_what_foretells_a_loss_is_the_result():
    runs = json.loads((ROOT / "benchmarks/results/prediction_digits.json").read_text())
    summary = json.loads(json.dumps(prediction.summarise(runs["runs"])))
    assert summary == runs["summary"]
    assert tables.markdown(prediction.CORRELATIONS, prediction.correlations(summary)) in PAGE
    assert tables.markdown(prediction.DROPS, prediction.drops(summary)) in PAGE
    large, mastered = (summary["errors"][name] for name in ("predicted over .2", "mastered, .95 at the anchor"))
    assert f"finds {large['measured']:.3f} of {large['true']:.3f}".replace("0.", ".") in PAGE
    text = (
        f"({mastered['predicted']:.3f} of {mastered['true']:.3f}) and measured well ({mastered['measured']:.3f})"
    )
    assert text in PAGE
    assert all(pair["outside"] < pair["inside"] for run in runs["runs"] for pair in run["pairs"])
    ranks = summary["rank_correlation"]["over_domains"]
    guess, look = ranks["predicted"]["mean"], ranks["measured"]["mean"]
    assert f"comes close ({guess:.2f} and {look:.2f})" in PAGE
    every = summary["errors"]["all"]
    text = f"(now {every['measured_error']:.3f}) and the prediction by .078 ({every['predicted_error']:.3f})"
    assert text.replace("0.", ".") in PAGE


def test_what_the_probe_is_made_of_is_the_result():
    found = json.loads((ROOT / "benchmarks/results/retained.json").read_text())
    assert json.loads(json.dumps(retained.summarise(found["runs"]))) == found["summary"]
    assert tables.markdown(retained.HEAD, retained.cells(found["summary"])) in PAGE
