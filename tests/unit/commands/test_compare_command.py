import json
import shutil

import pytest
import torch

from interference_guard.checkpoint import DETAILS
from interference_guard.cli import main
from tests.unit.helpers import Toy
from tests.unit.runs import save_model


def compare(capsys, *words):
    assert main(["compare", *map(str, words)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_checkpoints_without_an_edit_have_no_most_changed_neurons(capsys, toy_run):
    base, after = (toy_run[0] / f"phase-{index}" for index in (1, 3))
    found = json.loads(compare(capsys, base, base, base, after, after, "--json"))
    labels = [(pair["first"], pair["second"]) for pair in found["top_neurons"]]
    assert labels == [(str(after), str(after))]
    assert "most changed neurons" not in compare(capsys, base, base, base)


def test_edits_outside_of_the_mlps_have_no_overlap_of_neurons(capsys, tmp_path):
    folders = []
    for seed in range(3):
        model = Toy()
        with torch.no_grad():
            model.lm_head.weight.add_(float(seed))
        folders.append(save_model(model, tmp_path / str(seed)))
    found = json.loads(compare(capsys, *folders, "--json"))
    assert found["edits"][1]["norm"] > 0
    assert found["top_neurons"] == []


@pytest.mark.parametrize(
    ("region", "unit", "shown"),
    [
        ({"ratio": "sequence", "xx": 1.0, "xy": 1.0}, "reward", "reward range"),
        ({"ratio": "nats", "xx": 1.0, "xy": 1.0}, "nats", "nats per token"),
        ({"ratio": "sequence", "xx": 0.0, "xy": 0.0}, None, "-"),
        # Its region was moved just now, with new directions.
        ({"ratio": "nats", "xx": 0.0, "xy": 0.0, "centre_loss": 0.1}, "nats", "nats per token"),
    ],
    ids=["reward", "nats", "never measured", "just moved"],
)
def test_a_prediction_names_its_unit(capsys, toy_run, tmp_path, region, unit, shown):
    state = shutil.copytree(toy_run[0] / "phase-3", tmp_path / "state")
    table = json.loads((state / DETAILS).read_text())
    table["domains"]["math"]["region"] |= region
    (state / DETAILS).write_text(json.dumps(table))
    words = [toy_run[0] / "phase-1", toy_run[0] / "phase-3", "--state", state]
    by_domain = {item["domain"]: item for item in json.loads(compare(capsys, *words, "--json"))["predictions"]}
    assert by_domain["math"]["unit"] == unit
    assert by_domain["code"]["unit"] == "reward"
    (row,) = (line for line in compare(capsys, *words).splitlines() if ", math" in line)
    assert row.rpartition("│")[2].strip() == shown


def test_a_region_that_was_moved_says_nothing_of_earlier_checkpoints(capsys, toy_run, tmp_path):
    for index in (1, 2, 3):
        shutil.copytree(toy_run[0] / f"phase-{index}", tmp_path / str(index))
    shutil.copytree(toy_run[0] / "phase-1", tmp_path / "bare")
    (tmp_path / "bare" / DETAILS).unlink()
    # From before the domain was met.
    shutil.copytree(toy_run[0] / "phase-1", tmp_path / "0")
    table = json.loads((tmp_path / "0" / DETAILS).read_text())
    del table["domains"]["math"]
    (tmp_path / "0" / DETAILS).write_text(json.dumps(table))
    for index, (step, times) in enumerate(((0, 0), (25, 1), (25, 1)), 1):
        path = tmp_path / str(index) / DETAILS
        table = json.loads(path.read_text())
        table["domains"]["math"] |= {"renewed_at": step, "renewals": times}
        path.write_text(json.dumps(table))
    words = [*(tmp_path / name for name in ("1", "0", "1", "2", "3", "bare")), "--state", tmp_path / "3"]
    found = [
        item for item in json.loads(compare(capsys, *words, "--json"))["predictions"] if item["domain"] == "math"
    ]
    # Without a state beside it a checkpoint's place in the run is not known.
    assert [item["raw"] is None for item in found] == [True, True, False, False, False]
    assert {item["moved_at"] for item in found} == {25}
    assert found[0]["predicted"] is found[0]["unit"] is None
    shown = " ".join(compare(capsys, *words).split())
    assert "math: since its region was moved, at foreign step 25 after its anchor" in shown
    assert "code: since" not in shown
