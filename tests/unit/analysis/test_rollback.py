import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from interference_guard import Guard, GuardConfig, GuardedOptimizer
from interference_guard.analysis import (
    StateFile,
    checkpoints,
    open_checkpoint,
    pieces,
    plan_rollback,
    predict_interference,
    write_rollback,
)
from interference_guard.analysis.rollback import MODES
from interference_guard.checkpoint import DETAILS, TENSORS
from interference_guard.errors import CheckpointError, ConfigError, ReportError
from interference_guard.files import SECTION_BEGIN, SECTION_END
from interference_guard.rounding import round_at_random
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
    left = predict_interference(made.record, after, before=before).raw
    assert left / made.whole_interference == pytest.approx(said["interference_left"], rel=1e-3)
    edit = sum(float((after.rows(name) - before.rows(name)).square().sum()) for name in before.shapes)
    assert edit / made.whole_edit == pytest.approx(said["edit_left"], rel=1e-4)


def test_all_harmful_units_at_full_strength_are_as_they_were(toy_run, tmp_path):
    made = plan(toy_run[0], "units")
    write_rollback(made, 1.0, 1.0, tmp_path / "out")
    before, source = (open_checkpoint(toy_run[0] / f"phase-{index}") for index in (1, 3))
    after, views = open_checkpoint(tmp_path / "out"), made.record.state.views
    harmless = 0
    for name, view in views.items():
        harms = made.interference[name] > 0
        harmless += int((~harms).sum())
        old, new, now = (view.view(item.rows(name)) for item in (before, source, after))
        torch.testing.assert_close(now[harms], old[harms], rtol=0, atol=1e-6)
        # What costs the domain nothing is left to the one that learned it.
        assert torch.equal(now[~harms], new[~harms])
    assert harmless


@pytest.mark.parametrize("mode", MODES)
def test_the_curve_falls_and_beats_random_units(toy_run, mode):
    made = plan(toy_run[0], mode)
    left = [row["interference_left"] for row in made.curve()]
    assert left == sorted(left, reverse=True)
    assert all(-1e-6 <= value <= 1 for value in left)
    # Ten per cent of the units at random would take a tenth of the interference, on average.
    assert made.predict(0.1, 1.0)["interference_left"] < 0.9


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


def test_records_of_the_run_as_it_was_are_left_out(toy_run, tmp_path):
    source = shutil.copytree(toy_run[0] / "phase-3", tmp_path / "source")
    for name in ("interference_guard_history.jsonl", "interference_guard_history.jsonl.damaged", "report.html"):
        (source / name).write_text("x")
    # Left by an earlier save in shards.
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (source / name).write_text("{}")
    card = b"---\ntags: [trl]\n---\r\n# Toy \xff\r\n"
    section = f"\n\n{SECTION_BEGIN}\n| math | 0.3 |\n{SECTION_END}\n## More\n".encode()
    (source / "README.md").write_bytes(card + section)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("T")
    for _ in range(2):
        # A folder of templates is part of the checkpoint that may be replaced.
        write_rollback(plan(toy_run[0], "units", source), 0.1, 1.0, tmp_path / "out", force=True)
    written = {str(item.relative_to(tmp_path / "out")) for item in (tmp_path / "out").rglob("*")}
    templates = {"additional_chat_templates", "additional_chat_templates/tools.jinja"}
    assert written == {"model.safetensors", "README.md", *templates}
    assert (tmp_path / "out/README.md").read_bytes() == card.rstrip() + b"\n## More\n"
    (source / "README.md").write_bytes(card)
    write_rollback(plan(toy_run[0], "units", source), 0.1, 1.0, tmp_path / "out", force=True)
    assert (tmp_path / "out/README.md").read_bytes() == card


def test_shards_in_folders_and_states_of_ranks(toy_run, tmp_path):
    source = save_model(load(toy_run[0] / "phase-3"), tmp_path / "source", 2)
    index = source / "model.safetensors.index.json"
    (source / "parts").mkdir()
    for file in source.glob("model-*.safetensors"):
        file.rename(source / "parts" / file.name)
    index.write_text(index.read_text().replace("model-", "parts/model-"))
    for name in ("interference_guard_rank1.safetensors", "interference_guard_rank1.json"):
        (source / name).write_text("x")
    made = plan(toy_run[0], "units", source)
    said = write_rollback(made, 1.0, 1.0, tmp_path / "out")
    written = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert written == {index.name, *(f"parts/model-0000{part}-of-00002.safetensors" for part in (1, 2))}
    assert said["interference_left"] < 0.5


def test_the_present_folder_can_be_the_target(toy_run, tmp_path, monkeypatch):
    made = plan(toy_run[0].resolve(), "directions")
    write_rollback(made, 0.1, 1.0, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ReportError, match="exists already"):
        write_rollback(made, 1.0, 1.0, ".")
    write_rollback(made, 1.0, 1.0, ".", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert open_checkpoint(tmp_path / "out").shapes


def test_nothing_is_overwritten_without_force(toy_run, tmp_path):
    made = plan(toy_run[0], "directions")
    out = tmp_path / "out"
    write_rollback(made, 0.1, 1.0, out)
    (out / "mine").write_text("x")
    with pytest.raises(ReportError, match="exists already"):
        write_rollback(made, 0.1, 1.0, out)
    assert (out / "mine").read_text() == "x"
    write_rollback(made, 0.1, 1.0, out, force=True)
    assert not (out / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_is_read_and_folders_above_it_are_never_replaced(toy_run, tmp_path):
    parts = {name: tmp_path / name / "deep" for name in ("base", "source", "state")}
    for name, phase in (("base", "phase-1"), ("source", "phase-3"), ("state", "phase-3")):
        shutil.copytree(toy_run[0] / phase, parts[name])
    record = StateFile(parts["state"]).domain("math")
    made = plan_rollback(record, open_checkpoint(parts["base"]), open_checkpoint(parts["source"]))
    before = sorted(path for path in tmp_path.rglob("*"))
    for folder in parts.values():
        for taken in (folder, folder.parent, tmp_path):
            with pytest.raises(ReportError, match="is, or holds, the checkpoint or the state that is read"):
                write_rollback(made, 0.1, 1.0, taken, force=True)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["notes.txt"], "holds files but no checkpoint, and only a checkpoint is replaced"),
        ([TENSORS], "holds files but no checkpoint"),
        (["model.safetensors", "checkpoint-1/model.safetensors"], "holds folders, for instance 'checkpoint-1'"),
        ([], "is a file"),
    ],
    ids=str,
)
def test_force_replaces_nothing_but_a_checkpoint(toy_run, tmp_path, names, message):
    out = tmp_path / "out"
    if not names:
        out.write_text("x")
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    with pytest.raises(ReportError, match=message):
        write_rollback(plan(toy_run[0], "directions"), 0.1, 1.0, out, force=True)
    assert all((out / name).read_text() == "x" for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_empty_folder_holds_nothing_to_lose(toy_run, tmp_path):
    (tmp_path / "out").mkdir()
    write_rollback(plan(toy_run[0], "directions"), 0.1, 1.0, tmp_path / "out", force=True)
    assert open_checkpoint(tmp_path / "out").shapes


def test_the_old_checkpoint_stays_where_the_new_one_cannot_take_its_place(toy_run, tmp_path, monkeypatch):
    made, out = plan(toy_run[0], "directions"), tmp_path / "out"
    write_rollback(made, 0.1, 1.0, out)
    old, rename = (out / "model.safetensors").read_bytes(), os.rename

    def fails(source, to):
        if ".tmp-" in Path(source).name:
            raise OSError("no space")
        rename(source, to)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(CheckpointError, match="cannot be written: no space"):
        write_rollback(made, 1.0, 1.0, out, force=True)
    assert (out / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def small_edit(toy_run, tmp_path, dtype):
    """The toy before and after an edit of a part of a bf16 step, and the state of the run."""
    before = load(toy_run[0] / "phase-1").to(dtype)
    after = load(toy_run[0] / "phase-1").to(dtype).float()
    other = load(toy_run[0] / "phase-3")
    with torch.no_grad():
        for (_, weight), moved in zip(after.named_parameters(), other.parameters(), strict=True):
            weight.add_(moved - weight, alpha=0.02)
    folders = [save_model(model, tmp_path / name, dtype=dtype) for name, model in (("a", before), ("b", after))]
    record = StateFile(toy_run[0] / "phase-3").domain("math")
    return record, *map(open_checkpoint, folders)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_is_reported_is_what_low_precision_holds(toy_run, tmp_path, dtype, mode, strength):
    record, before, after = small_edit(toy_run, tmp_path, dtype)
    made = plan_rollback(record, before, after, mode)
    said = write_rollback(made, 1.0, strength, tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    left = predict_interference(record, written, before=before).raw / made.whole_interference
    assert said["interference_left"] == pytest.approx(left, rel=1e-6)
    edit = sum(float((written.rows(name) - before.rows(name)).square().sum()) for name in before.shapes)
    assert said["edit_left"] == pytest.approx(edit / made.whole_edit, rel=1e-4)
    write_rollback(made, 1.0, strength, tmp_path / "again")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second
    if mode == "units" and strength == 1:
        assert said["interference_left"] == 0, "whole units come back to the last bit"


@pytest.mark.filterwarnings("ignore:No completions of domain:UserWarning")
def test_bf16_keeps_corrections_that_are_smaller_than_its_steps(tmp_path):
    """Wide units, as models have: a correction spread over them is less than half a step of each weight."""
    width, generator = 512, torch.Generator().manual_seed(0)
    model = torch.nn.Linear(width, 64, bias=False)
    guard = Guard(model, GuardConfig(rank=8, sketch=16, residual=4, project=False))
    optimizer = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), guard)
    directions = torch.linalg.qr(torch.randn(width, 8, generator=generator)).Q
    for name in ["own"] * 12 + ["other"]:
        model.weight.grad = torch.randn(64, 8, generator=generator) @ directions.T
        with guard.domain(name):
            optimizer.step()
    base = model.weight.detach().bfloat16().float()
    edit = torch.randn(64, 8, generator=generator) @ directions.T
    edit *= 3e-5 / edit.std()
    for name, weight in (("a", base), ("b", round_at_random(base + edit, generator).float())):
        with torch.no_grad():
            model.weight.copy_(weight)
        save_model(model, tmp_path / name, dtype=torch.bfloat16)
    guard.save(tmp_path / "b")
    a, b = (open_checkpoint(tmp_path / name) for name in "ab")
    made = plan_rollback(StateFile(tmp_path / "b").domain("own"), a, b)
    said = write_rollback(made, 1.0, 1.0, tmp_path / "out")
    # To the nearest number, a third would stay.
    D = b.rows("weight") - a.rows("weight")
    (part,) = made.record.parts()
    nearest = (b.rows("weight") - D @ part.block.U[0] @ part.block.U[0].T).bfloat16().float() - a.rows("weight")
    interference = sum(float(item.sum()) for item in part.interference(part.see(lambda i, j: nearest[i:j])))
    assert said["interference_left"] < 0.5 * interference / made.whole_interference


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_what_whole_tensors_give(toy_run, tmp_path, monkeypatch, mode, dtype):
    record, before, after = small_edit(toy_run, tmp_path, dtype)
    whole = plan_rollback(record, before, after, mode)
    write_rollback(whole, 0.5, 1.0, tmp_path / "whole")
    monkeypatch.setattr(pieces, "pieces", lambda shape: checkpoints.pieces(shape, 48))
    made = plan_rollback(record, before, after, mode)
    for name, values in whole.interference.items():
        torch.testing.assert_close(made.interference[name], values, rtol=1e-3, atol=1e-12)
        torch.testing.assert_close(made.edit[name], whole.edit[name], rtol=1e-3, atol=1e-12)
    write_rollback(made, 0.5, 1.0, tmp_path / "pieces")
    one, other = (open_checkpoint(tmp_path / name) for name in ("whole", "pieces"))
    for name in one.shapes:
        # In bf16 the random bits fall on other weights; by a step at most.
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(other.rows(name), one.rows(name), rtol=tolerance, atol=1e-7)


@pytest.mark.filterwarnings("ignore:No completions of domain:UserWarning")
@pytest.mark.parametrize("alike", [True, False])
def test_a_head_stored_as_a_copy_of_the_embedding_stays_one(tmp_path, alike):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(6, 4)
            self.lm_head = torch.nn.Linear(4, 6, bias=False)
            self.lm_head.weight = self.embed_tokens.weight

    model = Tied()
    guard = Guard(model, GuardConfig(rank=2, sketch=4, residual=2, project=False))
    optimizer = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), guard)
    for step, name in enumerate(("math", "math", "code")):
        if step == 2:
            save_model(model, tmp_path / "before")
        with guard.domain(name):
            model.lm_head(model.embed_tokens(torch.arange(6))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    if not alike:
        model.lm_head.weight = torch.nn.Parameter(model.embed_tokens.weight + 1)
    save_model(model, tmp_path / "after", shards=2)
    (tmp_path / "after/config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    guard.save(tmp_path / "after")
    before, after = (open_checkpoint(tmp_path / name) for name in ("before", "after"))
    assert {"lm_head.weight", "embed_tokens.weight"} == set(after.shapes)
    made = plan_rollback(StateFile(tmp_path / "after").domain("math"), before, after)
    write_rollback(made, 1.0, 1.0, tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    embedding, head = (written.rows(name) for name in ("embed_tokens.weight", "lm_head.weight"))
    assert not torch.equal(embedding, after.rows("embed_tokens.weight"))
    assert torch.equal(head, embedding if alike else after.rows("lm_head.weight"))


def test_a_share_without_units_is_refused(toy_run, tmp_path):
    made = plan(toy_run[0], "units")
    with pytest.raises(ConfigError, match=r"share=0\.0001 of the \d+ edited units is less than one.* at least"):
        write_rollback(made, 0.0001, 1.0, tmp_path / "out")
    count = sum(int((item > 0).sum()) for item in made.edit.values())
    made.check(float(f"{1 / count:.2g}"), 1.0)
    same = open_checkpoint(toy_run[0] / "phase-1")
    empty = plan_rollback(made.record, same, same)
    with pytest.raises(ConfigError, match="No unit's edit is predicted to cost 'math' anything"):
        write_rollback(empty, 1.0, 1.0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
