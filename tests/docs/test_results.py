"""The README's table is the committed result, rounded."""

import json
import re
from pathlib import Path

import pytest

from interference_guard import GuardConfig

ROOT = Path(__file__).resolve().parents[2]
FORGETTING = json.loads((ROOT / "benchmarks/results/forgetting.json").read_text())
OVERHEAD = json.loads((ROOT / "benchmarks/results/overhead.json").read_text())
README = (ROOT / "README.md").read_text()
ROW = re.compile(r"^\| \**(plain|guarded|mixed)\**, (\S+) \|(.+)\|$", re.M)


def test_every_run_is_there():
    keys = {(r["run"]["method"], r["run"]["rate"], r["run"]["seed"]) for r in FORGETTING["runs"]}
    for method, rate in ((m["method"], m["rate"]) for m in FORGETTING["summary"]["by_method"]):
        assert {(method, rate, seed) for seed in (0, 1, 2)} <= keys


def test_the_table_is_the_result():
    rows = {(m["method"], m["rate"]): m for m in FORGETTING["summary"]["by_method"]}
    quoted = ROW.findall(README)
    assert len(quoted) == len([key for key in rows if key[0] != "observed"])
    for method, rate, cells in quoted:
        found = rows[method, float(rate)]
        numbers = [cell.strip().strip("*") for cell in cells.split("|")]
        assert numbers[:4] == [f"{found[key]:.3f}" for key in ("own", "average", "forgetting", "last")]
        seeds = [
            r for r in FORGETTING["runs"] if r["run"]["method"] == method and r["run"]["rate"] == float(rate)
        ]
        assert numbers[4] == ", ".join(
            f"{r['average']:.3f}" for r in sorted(seeds, key=lambda r: r["run"]["seed"])
        )


def test_summaries_follow_from_the_runs():
    for row in FORGETTING["summary"]["by_method"]:
        runs = [
            r
            for r in FORGETTING["runs"]
            if (r["run"]["method"], r["run"]["rate"]) == (row["method"], row["rate"])
        ]
        assert row["average"] == pytest.approx(sum(r["average"] for r in runs) / len(runs))
        for r in runs:
            assert r["average"] == pytest.approx(sum(r["final"].values()) / len(r["final"]))
            earlier = r["run"]["order"][:-1]
            drop = sum(r["own"][name] - r["final"][name] for name in earlier) / len(earlier)
            assert r["forgetting"] == pytest.approx(drop)


@pytest.mark.parametrize("page", ["README.md", "docs/limits.md"])
def test_quoted_losses_beside_the_budget(page):
    text = (ROOT / page).read_text()
    guarded = [run for run in FORGETTING["runs"] if run["run"]["method"] == "guarded"]
    assert all(run["run"]["guard"] == {} for run in guarded), "the runs must be at the default budget"
    lost = [run["own"][name] - run["final"][name] for run in guarded for name in run["run"]["order"][:-1]]
    over = sum(loss > GuardConfig().budget for loss in lost)
    assert re.search(rf"\b{over} of (the )?{len(lost)} (earlier )?domains ended more than 0\.02 under", text)
    assert re.search(rf"mean loss was {sum(lost) / len(lost):.3f}(,| and) the worst (was )?{max(lost):.3f}", text)
    if page == "docs/limits.md":
        assert f"two pass rates on {guarded[0]['run']['tests']} rows" in text


def test_quoted_overhead():
    for row in OVERHEAD["rows"]:
        if row["protected"]:
            assert f"{row['share']:.1%}" in README
    guarded = next(m for m in FORGETTING["summary"]["by_method"] if m["method"] == "guarded")
    assert f"with up to seven protected, it is {guarded['overhead']:.1%}" in README


def test_quoted_correlations():
    for rate, found in FORGETTING["summary"]["spearman"].items():
        numbers = [
            f"{found['mean'][name]:.2f}"
            for name in ("first_phase_reward", "first_phase_nats", "whole_run_reward", "whole_run_nats")
        ]
        assert f"| {float(rate):.0e} | {' | '.join(numbers)} |".replace("e-0", "e-") in README


def test_quoted_first_order():
    page = (ROOT / "docs/concepts/first_order.md").read_text()
    for rate, found in FORGETTING["summary"]["spearman"].items():
        numbers = [
            f"{found['mean'][name]:.2f}" for name in ("first_phase_reward", "first_phase_reward_first_order")
        ]
        assert f"| {float(rate):.0e} | {' | '.join(numbers)} |".replace("e-0", "e-") in page


def test_quoted_recovery():
    summary = json.loads((ROOT / "benchmarks/results/recovery.json").read_text())["summary"]
    page, found = (ROOT / "docs/concepts/recovery.md").read_text(), summary["by_variant"]
    assert f"takes away {summary['alone_closes']:.0%} of the forgetting" in page
    assert f"takes away {summary['loose_closes']:.0%} of what was left" in page
    assert f"{summary['phases']['regained']} of {summary['phases']['all']} phases brought" in page
    best = found["loose with recovery"]
    default = next(m for m in FORGETTING["summary"]["by_method"] if m["method"] == "guarded")
    assert f"{best['average']:.3f}; the default guard without recovery ends at {default['average']:.3f}" in page
    assert f"ends at {best['average']:.3f} and forgets {best['forgetting']:.3f}, with" in README
    assert f"with {best['recovery_share']:.1%} of the steps" in README
    for label, name in (
        ("plain", "plain"),
        ("recovery alone, from 0.05", "alone"),
        ("projection alone, budget 0.1", "loose"),
        ("the same, and recovery from 0.05", "loose with recovery"),
        ("default projection, and recovery", "default with recovery"),
    ):
        row = found[name]
        seeds = ", ".join(f"{row['seeds'][seed]:.3f}" for seed in "012")
        numbers = f"{row['average']:.3f} | {row['forgetting']:.3f} | {seeds} | {row['recovery_share']:.1%}"
        assert f"| {label} | {numbers} |" in page


def test_quoted_reference():
    found = json.loads((ROOT / "benchmarks/results/reference.json").read_text())["summary"]
    page = (ROOT / "docs/concepts/reference.md").read_text()
    assert list(found) == ["plain", "guarded, 0.01", "guarded, 0.003"]
    for method, row in found.items():
        seeds = ", ".join(f"{row['lost_by_seed'][seed]:.3f}" for seed in "012")
        numbers = f"{row['before']:.3f} | {row['after']:.3f} | {row['lost']:.3f} | {seeds} | {row['average']:.3f}"
        assert f"| {method} | {numbers} |" in page


def test_quoted_verl_runs():
    page = (ROOT / "docs/verl.md").read_text()
    for run in json.loads((ROOT / "examples/verl/two_domains.json").read_text())["seeds"][0]["runs"]:
        numbers = [f"{run[key]:.3f}" for key in ("first_own", "first_final", "lost", "second_final")]
        share = f"{run['guard_seconds'] / run['update_actor_seconds']:.1%}" if run["guarded"] else ""
        label = f"{'guarded' if run['guarded'] else 'plain'}, {run['rate']:.0e}".replace("e-0", "e-")
        assert f"| {label} | {' | '.join(numbers)} | {share} |" in page
