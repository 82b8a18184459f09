import json
import shutil

from interference_guard.cli import main
from interference_guard.history import HISTORY, History


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


def test_names_cannot_move_the_cursor(capsys, tmp_path):
    History(tmp_path / HISTORY).report(1, ["\x1b[31mred"], {"guard/\x1b[31mred/reward": 0.5})
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[31mred" in out


def test_what_interference_is_measured_in_is_said(capsys, tmp_path):
    history = History(tmp_path / HISTORY)
    values = {"measured": 0.01, "predicted": 0.01}
    table = {f"guard/{name}/{key}": value for name in ("math", "chat") for key, value in values.items()}
    history.report(1, ["new"], table | {"guard/math/nats": 0.0, "guard/chat/nats": 1.0, "guard/new/reward": 0.5})
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
