"""The gate stays shut for every domain of which nothing is known."""

import json

import pytest

from interference_guard.cli import main
from interference_guard.history import HISTORY, History


def check(capsys, folder, *words):
    code = main(["check", str(folder), *words, "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out) if captured.out else None
    rows = {} if found is None else {(item["domain"], item["what"]): item for item in found["checks"]}
    return code, rows, found, captured.err


BOTH = ("--max-forgetting", "0.02", "--max-interference", "0.02")


def test_a_reference_domain_is_judged(capsys, tmp_path):
    history = History(tmp_path / HISTORY)
    for step in range(1, 41):
        other = {"guard/math/measured": 0.001, "guard/math/forgetting": 0.001} if step > 20 else {}
        history.report(step, {"guard/general/measured": 5.0, **other}, active=["math" if step <= 20 else "code"])
    code, rows, found, _ = check(capsys, tmp_path, "--max-interference", "0.02")
    assert code == 1
    assert not rows["general", "interference"]["passed"]
    assert rows["math", "interference"]["passed"]
    assert found["in_training"] == ["code"]


@pytest.mark.parametrize("order", ["wxyz", "wx"])
def test_domains_that_reports_never_meet_are_judged(capsys, tmp_path, order):
    history = History(tmp_path / HISTORY)
    for step in range(10, 401, 10):
        now = order[step % len(order)]
        lost = {f"guard/{name}/measured": float(name == "x") for name in order if name != now}
        history.report(step, lost, active=[now])
    code, rows, _, _ = check(capsys, tmp_path, "--max-interference", "0.02")
    assert code == 1
    assert not rows["x", "interference"]["passed"]


def test_domains_in_turn_are_judged_after_thinning(capsys, tmp_path):
    history = History(tmp_path / HISTORY, limit=100)
    for step in range(1, 1001):
        now, other = ("math", "code") if step % 2 else ("code", "math")
        history.report(step, {f"guard/{other}/measured": 0.9 * (other == "math")}, active=[now])
    code, rows, _, _ = check(capsys, tmp_path, "--max-interference", "0.02")
    assert code == 1
    assert rows["math", "interference"]["value"] == 0.9


@pytest.mark.parametrize(("every", "length", "limit"), [(8, 60, 4000), (10, 125, 4000), (1, 400, 64)])
def test_a_domain_is_judged_from_the_end_of_its_phase(capsys, tmp_path, every, length, limit):
    history = History(tmp_path / HISTORY, limit=limit)
    rates = [{"a": 0.8, "b": 0.1, "c": 0.1}, {"a": 0.5, "b": 0.8, "c": 0.1}, {"a": 0.4, "b": 0.4, "c": 0.8}]
    for step in range(1, 3 * length + 1):
        if step % every == 0:
            history.report(step, {}, active=["abc"[(step - 1) // length]])
        if step % length == 0:
            history.evaluation(step, rates[step // length - 1])
    code, rows, _, _ = check(capsys, tmp_path, "--max-forgetting", "0.05")
    assert code == 1
    assert {name: item["value"] for (name, _), item in rows.items()} == pytest.approx({"a": 0.4, "b": 0.4})


def test_a_domain_of_which_nothing_is_known_keeps_the_gate_shut(capsys, tmp_path):
    history = History(tmp_path / HISTORY)
    for step in range(1, 31):
        history.report(step, {"guard/a/forgetting": 0.0} if step > 10 else {}, active=["abc"[(step - 1) // 10]])
    code, rows, found, err = check(capsys, tmp_path, "--max-forgetting", "0.02")
    assert code == 2
    assert not found["passed"]
    assert rows["b", "forgetting"]["value"] is None
    assert "does not say what 'b' lost" in err
    assert main(["check", str(tmp_path), "--max-forgetting", "0.02"]) == 2
    assert "not known" in capsys.readouterr().out


def test_a_limit_passed_goes_before_a_domain_unknown(capsys, tmp_path):
    history = History(tmp_path / HISTORY)
    for step in range(1, 31):
        history.report(step, {"guard/a/forgetting": 0.5} if step > 10 else {}, active=["abc"[(step - 1) // 10]])
    assert check(capsys, tmp_path, "--max-forgetting", "0.02")[0] == 1


def nats(folder, measured):
    history = History(folder / HISTORY)
    for step in range(1, 21):
        found = {"guard/a/measured": measured, "guard/a/nats": 1.0} if step > 10 else {}
        history.report(step, found, active=["a" if step <= 10 else "b"])


def test_a_domain_without_rewards_needs_the_limit_on_interference(capsys, tmp_path):
    nats(tmp_path, 0.005)
    code, _, _, err = check(capsys, tmp_path, "--max-forgetting", "0.02")
    assert code == 2
    assert "For one without rewards pass --max-interference" in err
    code, rows, _, _ = check(capsys, tmp_path, *BOTH)
    assert code == 0
    assert rows["a", "interference"]["unit"] == "nats per token"
    nats(tmp_path, 0.05)
    assert check(capsys, tmp_path, *BOTH)[0] == 1


def test_what_the_own_training_has_mended_is_over(capsys, tmp_path):
    history = History(tmp_path / HISTORY)
    for step in range(1, 61):
        name = ("math", "code", "math")[(step - 1) // 20]
        other = "code" if name == "math" else "math"
        value = 0.3 if name == "code" else 0.0
        lost = {f"guard/{other}/forgetting": value, f"guard/{other}/measured": value} if step > 20 else {}
        history.report(step, lost, active=[name])
    code, rows, found, _ = check(capsys, tmp_path, *BOTH)
    assert code == 0
    assert set(rows) == {("code", "forgetting"), ("code", "interference")}
    assert found["in_training"] == ["math"]
    assert main(["check", str(tmp_path), *BOTH]) == 0
    assert "in training at the end: math" in " ".join(capsys.readouterr().out.split())


def test_evaluations_before_the_first_step_alone_open_nothing(capsys, tmp_path):
    History(tmp_path / HISTORY).evaluation(0, {"m": 0.8})
    code, _, _, err = check(capsys, tmp_path, "--max-forgetting", "0.02")
    assert code == 2
    assert "has no forgetting of any domain" in err


def test_damaged_lines_are_said(capsys, tmp_path):
    history = History(tmp_path / HISTORY)
    for step in (1, 2):
        history.report(step, {"guard/math/measured": 0.01}, active=["math" if step == 1 else "code"])
    with (tmp_path / HISTORY).open("a") as file:
        file.write("{broken\n[]\n")
    assert check(capsys, tmp_path, "--max-interference", "0.02")[2]["skipped_lines"] == 2
    assert main(["check", str(tmp_path), "--max-interference", "0.02"]) == 0
    assert "2 damaged lines of the history were skipped." in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["nan", "-0.1", "inf", "-inf"])
@pytest.mark.parametrize("name", ["--max-forgetting", "--max-interference"])
def test_a_limit_that_every_run_passes_or_none_is_refused(capsys, tmp_path, name, limit):
    nats(tmp_path, 0.005)
    code, _, found, err = check(capsys, tmp_path, *BOTH, f"{name}={limit}")
    assert (code, found) == (2, None)
    assert f"{name} {float(limit)!r} is not allowed: it must be a number of at least 0" in err
