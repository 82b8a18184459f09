import json
import os
import shutil

import pytest

from interference_guard.cli import main
from interference_guard.commands import output
from interference_guard.files import DETAILS
from interference_guard.history import HISTORY, History
from interference_guard.report.run import find_state


def damaged(toy_run, folder):
    """The history, and a newest state that was cut off."""
    shutil.copy(toy_run[0] / HISTORY, folder / HISTORY)
    shutil.copytree(toy_run[0] / "phase-3", folder / "phase-3")
    with (folder / "phase-3" / "interference_guard.safetensors").open("r+b") as file:
        file.truncate(100)


def test_a_damaged_state_does_not_hide_the_history(capsys, toy_run, tmp_path):
    damaged(toy_run, tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 90
    assert "anchors" not in found
    assert "phase-3" in found["trouble"]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "No anchors: " in capsys.readouterr().out
    # Alone it is an error.
    assert main(["inspect", str(tmp_path / "phase-3")]) == 2


def test_a_history_without_a_step_does_not_hide_the_state(capsys, toy_run, tmp_path):
    shutil.copytree(toy_run[0] / "phase-3", tmp_path / "phase-3")
    (tmp_path / HISTORY).write_text((toy_run[0] / HISTORY).read_text().splitlines()[0] + "\n")
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "math" in found["anchors"]
    assert "steps" not in found
    assert "holds no step yet" in found["trouble"]
    # As where a run has just begun anew in the folder of another one.
    assert "of this run or of a former one" in found["trouble"]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "No history: " in capsys.readouterr().out


def test_states_of_ranks_lie_where_their_trainers_put_them(capsys, toy_run, tmp_path):
    verl = tmp_path / "run/global_step_7/actor"
    for rank in (1, 0):
        shutil.copytree(toy_run[0] / "phase-3", verl / f"interference_guard_rank{rank}")
    trl = tmp_path / "trl/checkpoint-7"
    shutil.copytree(toy_run[0] / "phase-3", trl)
    shutil.copytree(toy_run[0] / "phase-2", trl / "interference_guard_rank1")
    first = verl / "interference_guard_rank0"
    for folder, found in ((verl.parent, first), (tmp_path / "run", first), (verl, first), (trl, trl)):
        assert main(["inspect", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["state"] == str(found)


def test_the_latest_state_is_that_of_the_most_steps(capsys, toy_run, tmp_path):
    for phase, age in ((1, 1), (3, 3), (2, 2)):
        shutil.copytree(toy_run[0] / f"phase-{phase}", tmp_path / f"checkpoint-{phase}")
        # A copy's files are of any age; here the earlier the state, the newer its file.
        os.utime(tmp_path / f"checkpoint-{phase}" / DETAILS, (9000 - age, 9000 - age))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / DETAILS).write_text("[]")
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["state_steps"]) == (str(tmp_path / "checkpoint-3"), 90)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "checkpoint-3, of step 90" in " ".join(capsys.readouterr().out.split())
    # Of one step, the newest file.
    for phase, age in ((4, 5000), (5, 4000)):
        shutil.copytree(toy_run[0] / "phase-3", tmp_path / f"checkpoint-{phase}")
        os.utime(tmp_path / f"checkpoint-{phase}" / DETAILS, (age, age))
    os.utime(tmp_path / "checkpoint-3" / DETAILS, (3000, 3000))
    assert find_state(tmp_path) == tmp_path / "checkpoint-4"


def test_names_cannot_move_the_cursor(capsys, tmp_path):
    History(tmp_path / HISTORY).report(1, {"guard/\x1b[31mred/reward": 0.5}, active=["\x1b[31mred"])
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[31mred" in out


def test_what_interference_is_measured_in_is_said(capsys, tmp_path):
    history = History(tmp_path / HISTORY)
    values = {"measured": 0.01, "predicted": 0.01}
    table = {f"guard/{name}/{key}": value for name in ("math", "chat") for key, value in values.items()}
    history.report(
        1, table | {"guard/math/nats": 0.0, "guard/chat/nats": 1.0, "guard/new/reward": 0.5}, active=["new"]
    )
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["domains"]
    assert {name: found[name]["unit"] for name in found} == {"math": "reward", "chat": "nats", "new": None}
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("math" in line and "reward" in line for line in lines)
    assert any("chat" in line and "nats" in line for line in lines)


def test_a_path_that_does_not_exist_is_no_other_run(capsys, toy_run, tmp_path):
    shutil.copytree(toy_run[0] / "phase-3", tmp_path / "other")
    assert main(["inspect", str(tmp_path / "typo")]) == 2
    assert "holds neither a guard's history nor a guard's state" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 30])
def test_names_fold_and_numbers_stay_whole(capsys, monkeypatch, tmp_path, width):
    monkeypatch.setenv("COLUMNS", str(width))
    keys = {"reward": 0.409, "predicted": 0.0052, "measured": 0.0033, "radius": 4.65e-3, "protected_share": 1.0}
    name = "reasoning_about_numbers"
    values = {f"guard/{name}/{key}": value for key, value in keys.items()}
    History(tmp_path / HISTORY).report(1, values | {f"guard/{name}/nats": 0.0}, active=["new"])
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")] for line in lines if "│" in line]
    assert rows[1][1:] == ["0.409", "-", "0.0052", "0.0033", "4.65e-03", "100%", "reward"]
    assert "".join(row[0] for row in rows) == "new" + name
    assert any("predicted" in line for line in lines)
    if width == 80:
        assert max(map(len, lines)) <= width


def test_headers_give_way_before_names(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    output.table("", ["domain", "length of all weights"], [["reasoning_about", "1.234567"]])
    rows = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [cell.strip() for cell in rows[0].split("│")] == ["reasoning_about", "1.234567"]


def test_a_domain_without_evaluations_shows_its_training_reward(capsys, tmp_path):
    history = History(tmp_path / HISTORY)
    history.report(1, {"guard/math/reward": 0.3}, active=["math"])
    history.evaluation(1, {"math": 0.4})
    history.report(2, {"guard/code/reward": 0.5}, active=["code"])
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["domains"]
    assert [(item["reward"], item["reward_kind"]) for item in found.values()] == [
        (0.4, "evaluated"),
        (0.5, "training"),
    ]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "the reward is that of training: code." in capsys.readouterr().out


def short_run(folder, steps):
    """A run of one domain with reports at these steps, at 0 an evaluation."""
    history = History(folder / HISTORY)
    for step in steps:
        if step:
            history.report(step, {"guard/math/reward": 0.5}, active=["math"])
        else:
            history.evaluation(step, {"math": 0.1})


def test_a_state_that_a_former_run_left_is_not_shown_as_this_run_s(capsys, toy_run, tmp_path):
    # Begun anew: the checkpoints of 60 and 90 steps are of the run before.
    for phase in (1, 2, 3):
        shutil.copytree(toy_run[0] / f"phase-{phase}", tmp_path / f"phase-{phase}")
    short_run(tmp_path, range(0, 41, 10))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["state_steps"]) == (str(tmp_path / "phase-1"), 30)
    assert "phase-3 is left out: it is of step 90, and the history ends at step 40." in found["trouble"]
    shutil.rmtree(tmp_path / "phase-1")
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "State in" not in out
    assert "Most likely a former run left it" in out
    # Asked for itself it is shown.
    assert main(["inspect", str(tmp_path / "phase-3")]) == 0
    assert "of step 90" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("steps", [[25], [0, 25], [20, 25], [10, 20], [0]])
def test_a_state_saved_between_two_reports_is_the_run_s_own(capsys, toy_run, tmp_path, steps):
    shutil.copytree(toy_run[0] / "phase-1", tmp_path / "phase-1")
    short_run(tmp_path, steps)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state_steps"] == 30
    assert "trouble" not in found
