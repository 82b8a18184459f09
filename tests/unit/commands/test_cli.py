import importlib
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch

from interference_guard.analysis import open_checkpoint
from interference_guard.cli import main
from interference_guard.history import HISTORY, History
from tests.unit.helpers import Toy
from tests.unit.runs import save_model

COMMANDS = ("inspect", "report", "compare", "rollback", "check", "doctor")


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return code, captured.out, captured.err


def test_help_names_every_command_with_an_example(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in COMMANDS:
        assert name in out
        code, own, _ = run(capsys, name, "--help")
        assert code == 0
        assert f"interference-guard {name}" in " ".join(own.split())


@pytest.mark.parametrize(
    "words", [["report"], ["nonsense"], ["check", "--max-forgetting", "x", "y"], ["compare", "a"]]
)
def test_wrong_usage_exits_with_2(capsys, words):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert err


def test_inspect(capsys, toy_run):
    code, out, _ = run(capsys, "inspect", toy_run[0], "--json")
    found = json.loads(out)
    assert code == 0
    assert found["steps"] == 90
    assert set(found["domains"]) == {"math", "code", "qa"}
    assert found["domains"]["math"]["lost"] > 0
    assert found["anchors"]["math"] == {
        "anchored": True,
        "steps_since": 60,
        "reward_at_anchor": found["anchors"]["math"]["reward_at_anchor"],
    }
    code, out, _ = run(capsys, "inspect", toy_run[0])
    assert code == 0
    assert "math" in out
    # A checkpoint alone will do.
    code, out, _ = run(capsys, "inspect", toy_run[0] / "phase-2", "--json")
    assert code == 0
    assert set(json.loads(out)["anchors"]) == {"math", "code"}


def test_inspect_of_nothing(capsys, tmp_path):
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2
    assert "holds neither a guard's history nor a guard's state" in err


def test_report(capsys, toy_run, tmp_path):
    page = tmp_path / "x.html"
    code, out, _ = run(capsys, "report", toy_run[0], "-o", page)
    assert code == 0
    assert str(page) in out.replace("\n", "")
    code, _, err = run(capsys, "report", toy_run[0], "-o", page)
    assert code == 2
    assert "pass --force" in err
    assert run(capsys, "report", toy_run[0], "-o", page, "--force")[0] == 0


@pytest.mark.parametrize("kind", ["missing", "empty", "nonsense"])
def test_report_of_a_bad_run(capsys, tmp_path, kind):
    if kind == "empty":
        History(tmp_path / HISTORY)
    if kind == "nonsense":
        (tmp_path / HISTORY).write_text("x\n")
    code, _, err = run(capsys, "report", tmp_path)
    assert code == 2
    expected = {"missing": "has no guard history", "empty": "the run is empty", "nonsense": "could be read"}
    assert expected[kind] in err


def test_compare(capsys, toy_run):
    folders = [toy_run[0] / f"phase-{index}" for index in range(4)]
    code, out, _ = run(capsys, "compare", *folders, "--chain", "--json", "--state", folders[3])
    found = json.loads(out)
    assert code == 0
    assert [item["before"] for item in found["edits"]] == [str(path) for path in folders[:3]]
    assert len(found["top_neurons"]) == 3
    assert all(0 <= pair["jaccard"] <= 1 for pair in found["top_neurons"])
    assert {(item["domain"]) for item in found["predictions"]} == {"math", "code"}
    assert found["edits"][0]["places"]["lm_head"]["norm"] > 0
    code, out, _ = run(capsys, "compare", *folders, "--places")
    assert code == 0
    assert "phase-0 ->" in out.replace("\n", " ")
    same = json.loads(run(capsys, "compare", folders[0], folders[0], "--json")[1])
    assert same["edits"][0]["equal"] == same["edits"][0]["under_both"] == 1


def test_compare_of_different_models(capsys, tmp_path):
    a, b = save_model(Toy(), tmp_path / "a"), save_model(Toy(hidden=8), tmp_path / "b")
    code, _, err = run(capsys, "compare", a, b)
    assert code == 2
    assert "are of different architectures" in err


def test_compare_of_weights_that_are_not_finite(capsys, tmp_path):
    model = Toy()
    a = save_model(model, tmp_path / "a")
    model.lm_head.weight.data[0, 0] = torch.inf
    code, _, err = run(capsys, "compare", a, save_model(model, tmp_path / "b"))
    assert code == 2
    assert "holds NaN or infinity" in err


def test_rollback(capsys, toy_run, tmp_path):
    before, after = toy_run[0] / "phase-1", toy_run[0] / "phase-3"
    code, out, _ = run(capsys, "rollback", before, after, "--domain", "math", "--dry-run", "--json")
    assert code == 0
    assert len(json.loads(out)["rollback"]) > 5
    assert list(tmp_path.iterdir()) == []
    out_folder = tmp_path / "restored"
    words = ["rollback", before, after, "--domain", "math", "--share", "0.3", "-o", out_folder]
    assert run(capsys, *words)[0] == 0
    assert open_checkpoint(out_folder).shapes == open_checkpoint(after).shapes
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "pass --force" in err
    assert run(capsys, *words, "--force")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--domain", "math"], "Pass --out FOLDER, or --dry-run"),
        (["--domain", "art", "--dry-run"], "is not in"),
        (["--domain", "qa", "--dry-run"], "has no anchor"),
        (["--domain", "math", "--dry-run", "--strength", "3"], "strength=3.0 is not allowed"),
        (["--domain", "math", "--dry-run", "--mode", "x"], "mode='x' is not allowed"),
    ],
)
def test_rollback_with_wrong_words(capsys, toy_run, words, message):
    code, _, err = run(capsys, "rollback", toy_run[0] / "phase-1", toy_run[0] / "phase-3", *words)
    assert code == 2
    assert message in err


def test_check_is_a_gate(capsys, toy_run):
    code, out, _ = run(capsys, "check", toy_run[0], "--max-forgetting", "0.02", "--json")
    found = json.loads(out)
    assert code == 1
    assert not found["passed"]
    assert {item["domain"] for item in found["checks"]} == {"math", "code"}
    assert run(capsys, "check", toy_run[0], "--max-forgetting", "1")[0] == 0
    assert run(capsys, "check", toy_run[0], "--max-interference", "0.0001")[0] == 1
    code, _, err = run(capsys, "check", toy_run[0])
    assert code == 2
    assert "No limit is given" in err


def test_check_of_a_run_without_a_second_domain(capsys, tmp_path):
    history = History(tmp_path / HISTORY)
    history.report(1, {"guard/math/reward": 0.5}, active=["math"])
    code, _, err = run(capsys, "check", tmp_path, "--max-forgetting", "0.02")
    assert code == 2
    assert "has no forgetting of any domain" in err


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["ok"]
    packages = {item["package"]: item for item in found["packages"]}
    assert packages["torch"]["state"] == "ok"
    assert packages["trl"]["allowed"]
    assert run(capsys, "doctor")[0] == 0


def test_doctor_says_what_mends_a_wrong_version(capsys, monkeypatch):
    # The package's name for it is the command.
    doctor = sys.modules["interference_guard.commands.doctor"]
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "1.0" if name == "trl" else real(name))
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "pip install --upgrade 'trl" in out


def test_a_missing_extra_is_named(tmp_path):
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            raise ModuleNotFoundError('no typer', name='typer')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from interference_guard.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install 'interference-guard[report]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error", [TypeError("float\nof \x1b[31mNone"), ModuleNotFoundError("torch", name="torch")]
)
def test_a_fault_of_the_program_has_a_code_of_its_own(capsys, monkeypatch, tmp_path, error):
    # The package's name for it is the command.
    check = importlib.import_module("interference_guard.commands.check")

    def fail(path):
        raise error

    monkeypatch.setattr(check, "read_run", fail)
    code, _, err = run(capsys, "check", tmp_path, "--max-forgetting", "0.02")
    # 1 would say that a limit was passed.
    assert code == 3
    assert f"Error: {type(error).__name__}: " in err
    assert "Please report it" in err
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_report_of_a_history_with_a_damaged_field(capsys, tmp_path):
    history = History(tmp_path / HISTORY)
    for step in range(1, 5):
        history.report(step, {"guard/math/reward": 0.5, "guard/seconds": 0.1}, active=["math"], seconds=step)
    with (tmp_path / HISTORY).open("a") as file:
        file.write('{"kind":"step","step":5,"active":[],"seconds":null,"metrics":{"guard/seconds":0.1}}\n')
    code, out, _ = run(capsys, "report", tmp_path)
    assert code == 0
    assert "1 damaged line of the history was skipped." in out


def test_report_of_a_state_that_cannot_be_read(capsys, toy_run, tmp_path):
    page = tmp_path / "x.html"
    code, _, err = run(capsys, "report", toy_run[0], "-o", page, "--state", tmp_path / "typo", "--force")
    assert code == 2
    assert "typo has no guard state" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["inspect"], ["report"], ["check", "--max-forgetting", "1"]])
def test_a_run_that_ended_without_a_log(capsys, tmp_path, words):
    # What a run writes at its end is no step.
    History(tmp_path / HISTORY).places(6, {"curvature": {"math": {(0, "q_proj"): 1.0}}})
    code, _, err = run(capsys, *words, tmp_path)
    assert code == 2
    assert "holds no step yet" in err
    assert "logging_steps" in err


PROGRAM = [sys.executable, "-m", "interference_guard.cli"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["check", "--max-forgetting", "1"], 0),
        (["check", "--max-forgetting", "1", "--json"], 0),
        (["check", "--max-forgetting", "0.01"], 1),
        (["check"], 2),
        (["inspect"], 0),
    ],
)
def test_a_reader_that_has_gone_changes_no_exit_code(toy_run, words, code):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*PROGRAM, *words, str(toy_run[0])], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120
        )
        # The sentence of an error may have lost its reader too.
        both = subprocess.run([*PROGRAM, *words, str(toy_run[0])], stdout=writing, stderr=writing, timeout=120)
    finally:
        os.close(writing)
    assert (done.returncode, both.returncode) == (code, code)
    assert done.stderr.startswith("Error: No limit") if code == 2 else done.stderr == ""


@pytest.mark.parametrize("words", [["inspect"], ["check", "--max-interference", "0.1"]])
def test_names_that_the_terminal_s_encoding_lacks(tmp_path, words):
    history = History(tmp_path / HISTORY)
    history.report(1, {"guard/数学/reward": 0.5}, active=["数学"])
    history.report(2, {"guard/数学/measured": 0.01}, active=["code"])
    place = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*PROGRAM, *words, str(tmp_path)], env=place, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u6570\u5b66" in "".join(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "code"),
    [(["check", "--max-forgetting", "1"], 0), (["check", "--max-forgetting", "0.01", "--json"], 1)],
)
def test_a_closed_output_changes_no_exit_code(toy_run, words, code):
    command = shlex.join([*PROGRAM, *words, str(toy_run[0])])
    done = subprocess.run(["sh", "-c", f"{command} >&-"], stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("words", [["inspect"], ["check", "--max-forgetting", "0.01", "--json"]])
def test_an_output_that_cannot_be_written_is_told(toy_run, words):
    with open("/dev/full", "w") as full:
        command = [*PROGRAM, *words, str(toy_run[0])]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    # 1 would say that a limit was passed, and the lines that say which one are lost.
    assert done.returncode == 2
    assert done.stderr.startswith("Error: The output cannot be written: No space left on device.")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["inspect"], ["report"], ["check", "--max-forgetting", "1"], ["compare", "."]])
def test_a_path_that_the_system_refuses_is_no_fault_of_the_program(capsys, tmp_path, words):
    save_model(Toy(), tmp_path)
    words = [str(tmp_path) if word == "." else word for word in words]
    code, _, err = run(capsys, *words, tmp_path / ("a" * 300))
    assert code == 2
    assert "cannot be used: File name too long. Check the path" in err
