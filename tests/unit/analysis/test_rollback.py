import json
import shutil

import pytest
import torch

from interference_guard.analysis import (
    StateFile,
    open_checkpoint,
    plan_rollback,
    predict_damage,
    write_rollback,
)
from interference_guard.analysis.rollback import MODES
from interference_guard.checkpoint import DETAILS
from interference_guard.errors import CheckpointError, ConfigError, ReportError
from tests.unit.helpers import Toy, pass_rate
from tests.unit.runs import save_model


def plan(folder, mode, after=None):
    record = StateFile(folder / "phase-3").domain("math")
    return plan_rollback(
        record, open_checkpoint(folder / "phase-1"), open_checkpoint(after or folder / "phase-3"), mode
    )


def load(path):
    model, opened = Toy(), open_checkpoint(path)
    model.load_state_dict({name: opened.rows(name) for name in opened.shapes})
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_what_is_predicted_is_what_the_written_checkpoint_has(toy_run, tmp_path, mode, strength):
    made = plan(toy_run[0], mode)
    said = write_rollback(made, 0.2, strength, tmp_path / "out")
    before, after = open_checkpoint(toy_run[0] / "phase-1"), open_checkpoint(tmp_path / "out")
    left = predict_damage(made.record, after, before=before).raw
    assert left / made.whole_damage == pytest.approx(said["damage_left"], rel=1e-3)
    edit = sum(float((after.rows(name) - before.rows(name)).square().sum()) for name in before.shapes)
    assert edit / made.whole_edit == pytest.approx(said["edit_left"], rel=1e-4)


def test_all_harmful_units_at_full_strength_are_as_they_were(toy_run, tmp_path):
    made = plan(toy_run[0], "units")
    write_rollback(made, 1.0, 1.0, tmp_path / "out")
    before, source = (open_checkpoint(toy_run[0] / f"phase-{index}") for index in (1, 3))
    after, views = open_checkpoint(tmp_path / "out"), made.record.state.views
    harmless = 0
    for name, view in views.items():
        harms = made.damage[name] > 0
        harmless += int((~harms).sum())
        old, new, now = (view.view(item.rows(name)) for item in (before, source, after))
        torch.testing.assert_close(now[harms], old[harms], rtol=0, atol=1e-6)
        # What costs the domain nothing is left to the one that learned it.
        assert torch.equal(now[~harms], new[~harms])
    assert harmless


@pytest.mark.parametrize("mode", MODES)
def test_the_curve_falls_and_beats_random_units(toy_run, mode):
    made = plan(toy_run[0], mode)
    left = [row["damage_left"] for row in made.curve()]
    assert left == sorted(left, reverse=True)
    assert all(-1e-6 <= value <= 1 for value in left)
    # Ten per cent of the units at random would take a tenth of the damage, on average.
    assert made.predict(0.1, 1.0)["damage_left"] < 0.9


def test_rollback_restores_the_domain(toy_run, tmp_path):
    folder = toy_run[0]
    own, lost = (pass_rate(load(folder / f"phase-{index}"), "math") for index in (1, 3))
    assert own - lost > 0.1
    write_rollback(plan(folder, "directions"), 1.0, 1.0, tmp_path / "out")
    assert pass_rate(load(tmp_path / "out"), "math") > lost + (own - lost) / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_dtype_and_other_files_are_kept(toy_run, tmp_path, dtype):
    source = save_model(load(toy_run[0] / "phase-3"), tmp_path / "source", 2, dtype)
    (source / "config.json").write_text(json.dumps({"model_type": "toy"}))
    (source / "optimizer.pt").write_bytes(b"x")
    shutil.copy(toy_run[0] / "phase-3" / DETAILS, source / DETAILS)
    write_rollback(plan(toy_run[0], "units", source), 0.1, 1.0, tmp_path / "out")
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert kept == {path.name for path in source.iterdir()} - {"optimizer.pt", DETAILS}
    a, b = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert [entry.dtype for entry in b.entries.values()] == [dtype] * len(b.entries)
    changed = sum(int((a.rows(name) != b.rows(name)).any()) for name in a.shapes)
    assert 0 < changed <= len(a.shapes)


def test_nothing_is_overwritten_without_force(toy_run, tmp_path):
    made = plan(toy_run[0], "directions")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(ReportError, match="exists already"):
        write_rollback(made, 0.1, 1.0, out)
    assert (out / "mine").read_text() == "x"
    write_rollback(made, 0.1, 1.0, out, force=True)
    assert not (out / "mine").exists()
    for taken in (toy_run[0] / "phase-3", toy_run[0] / "phase-1", toy_run[0]):
        with pytest.raises(ReportError, match="is, or holds, the checkpoint that is read"):
            write_rollback(made, 0.1, 1.0, taken, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_place_that_cannot_be_written(toy_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_rollback(plan(toy_run[0], "units"), 0.1, 1.0, tmp_path / "file" / "out")


def test_values_out_of_range(toy_run):
    made = plan(toy_run[0], "units")
    for share, strength, name in ((0.0, 1.0, "share"), (2.0, 1.0, "share"), (0.5, 1.5, "strength")):
        with pytest.raises(ConfigError, match=f"{name}=.* must be a number above 0 and at most 1"):
            made.predict(share, strength)
    with pytest.raises(ConfigError, match=r"must be one of \['directions', 'units'\]"):
        plan(toy_run[0], "neurons")
