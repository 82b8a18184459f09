import dataclasses
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from interference_guard.checkpoint import DETAILS
from interference_guard.cli import main
from tests.unit.helpers import CONFIG, guarded, train
from tests.unit.runs import save_model


def rollback(capsys, *words):
    code = main(["rollback", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


@pytest.fixture
def run(toy_run, tmp_path):
    """The checkpoints of a run under one folder, and the last one apart."""
    shutil.copytree(toy_run[0], tmp_path / "run")
    shutil.copytree(toy_run[0] / "phase-3", tmp_path / "final")
    return tmp_path


@pytest.mark.parametrize("state", [False, True])
def test_force_spares_the_run_that_base_lies_in(capsys, run, state):
    files = sorted(run.rglob("*"))
    base = run / "run/phase-1"
    words = [base, run / "final", "--domain", "math", "--force"]
    if state:
        base = shutil.copytree(base, run / "elsewhere/base")
        files = sorted(run.rglob("*"))
        words = [base, run / "final", "--domain", "math", "--force", "--state", run / "run/phase-3"]
    code, _, err = rollback(capsys, *words, "-o", run / "run")
    assert code == 2
    assert "is, or holds, the checkpoint or the state that is read" in err
    assert sorted(run.rglob("*")) == files


def test_a_share_of_no_unit_writes_nothing(capsys, run):
    words = [run / "run/phase-1", run / "final", "--domain", "math", "--share", "0.002"]
    code, out, err = rollback(capsys, *words, "-o", run / "out")
    assert (code, out) == (2, "")
    assert "edited units is less than one, so nothing would be taken back. Give at least" in err
    assert not (run / "out").exists()


@pytest.mark.parametrize("kind", ["exists", "nothing chosen"])
def test_what_cannot_be_written_is_said_before_anything_is_measured(capsys, run, monkeypatch, kind):
    from interference_guard.analysis import measured

    def never(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(measured, "nats_per_token", never)
    (run / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    words = [run / "run/phase-1", run / "final", "--domain", "math", "--data", f"math={run}/rows.jsonl"]
    if kind == "exists":
        from interference_guard import analysis

        # Scoring reads both checkpoints: it comes later too.
        monkeypatch.setattr(analysis, "plan_rollback", never)
        code, _, err = rollback(capsys, *words, "-o", run / "run/phase-2")
        assert "exists already" in err
    else:
        code, _, err = rollback(capsys, *words, "-o", run / "out", "--share", "0.002")
        assert "less than one" in err
    assert code == 2


@pytest.mark.parametrize(("domain", "base", "told"), [("math", 1, False), ("math", 2, True), ("code", 1, True)])
def test_another_base_than_the_domains_anchor_is_told(capsys, run, domain, base, told):
    words = [run / f"run/phase-{base}", run / "final", "--domain", domain, "--dry-run"]
    code, out, _ = rollback(capsys, *words, "--json")
    trouble = json.loads(out).get("trouble")
    assert (code, trouble is not None) == (0, told)
    code, out, _ = rollback(capsys, *words)
    assert (f"phase-{base} is not where '{domain}' was last anchored" in " ".join(out.split())) == told


def test_a_region_that_has_moved_says_nothing_of_base(capsys, run):
    path = run / "final" / DETAILS
    details = json.loads(path.read_text())
    details["domains"]["math"]["renewed_at"] = 1
    path.write_text(json.dumps(details))
    words = [run / "run/phase-2", run / "final", "--domain", "math", "--dry-run", "--json"]
    assert "trouble" not in json.loads(rollback(capsys, *words)[1])


def test_a_base_that_was_rounded_is_where_the_domain_was_anchored(capsys, run):
    start, end = (load_file(run / f"run/phase-{index}/model.safetensors") for index in (1, 3))
    # An edit as small as the steps of bf16.
    after = {name: (value + 0.003 * (end[name] - value)).bfloat16() for name, value in start.items()}
    save_file(after, run / "final/model.safetensors")
    save_file({name: value.bfloat16() for name, value in start.items()}, run / "run/phase-1/model.safetensors")
    for base, told in ((1, False), (2, True)):
        words = [run / f"run/phase-{base}", run / "final", "--domain", "math", "--dry-run", "--json"]
        assert ("trouble" in json.loads(rollback(capsys, *words)[1])) is told


def test_the_anchor_of_a_domain_that_was_trained_again_is_its_latest(capsys, tmp_path):
    model, guard, optimizer = guarded(config=dataclasses.replace(CONFIG, renew=False))
    train(model, guard, optimizer, ["math"] * 10)
    save_model(model, tmp_path / "own")
    train(model, guard, optimizer, ["code"] * 10, start=10)
    train(model, guard, optimizer, ["math"] * 3, start=20)
    save_model(model, tmp_path / "again")
    train(model, guard, optimizer, ["code"] * 10, start=23)
    save_model(model, tmp_path / "final")
    guard.save(tmp_path / "final")
    for base, told in (("own", True), ("again", False)):
        words = [tmp_path / base, tmp_path / "final", "--domain", "math", "--dry-run", "--json"]
        trouble = json.loads(rollback(capsys, *words)[1]).get("trouble", "")
        assert ("last anchored, 10 steps before" in trouble) is told


@pytest.mark.parametrize("words", [["--share", "nan"], ["--share", "0"], ["--share", "2"], ["--strength", "nan"]])
def test_amounts_are_refused_in_a_dry_run_too(capsys, run, words):
    code, out, err = rollback(capsys, run / "run/phase-1", run / "final", "--domain", "math", "--dry-run", *words)
    assert (code, out) == (2, "")
    assert "is not allowed: it must be a number above 0 and at most 1" in err


def test_a_domain_with_two_files_is_refused(capsys, run):
    words = [run / "run/phase-1", run / "final", "--domain", "math", "-o", run / "out"]
    code, _, err = rollback(capsys, *words, "--data", "math=a.jsonl", "--data", "math=b.jsonl")
    assert code == 2
    assert "--data names 'math' twice" in err
