import json
import shutil

import pytest
import torch

from interference_guard import Guard, GuardedOptimizer, residual
from interference_guard.analysis import (
    StateFile,
    conflict_subspace,
    gradient_cosines,
    open_checkpoint,
    predict_interference,
    stored_gradients,
)
from interference_guard.checkpoint import DETAILS, TENSORS
from interference_guard.errors import CheckpointError, StateError, StateVersionError, UnknownDomainError
from tests.unit.helpers import CONFIG, Toy, guarded, train
from tests.unit.runs import save_model


@pytest.mark.parametrize("domain", ["math", "code"])
def test_prediction_from_disk_is_the_guard_s(toy_run, domain):
    folder, _, guard = toy_run
    record = StateFile(folder / "phase-3").domain(domain)
    found = predict_interference(record, open_checkpoint(folder / "phase-3"))
    live = guard.raw_parts([domain])[domain]
    inside = sum(float(part.sum()) for part in found.inside.values())
    outside = sum(float(part.sum()) for part in found.outside.values())
    assert inside == pytest.approx(live.inside, rel=1e-4)
    assert outside == pytest.approx(live.outside, rel=1e-4)
    assert found.raw > 0
    assert sum(found.by_place().values()) == pytest.approx(found.raw, rel=1e-6)
    neurons = found.neurons()["mlp"]
    assert len(neurons) == 32
    parts = sum(float(found.units[f"mlp.{name}.weight"].sum()) for name in ("up_proj", "down_proj"))
    assert float(neurons.sum()) == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("full", [residual.FULL, 8])
def test_prediction_with_a_protected_set(tmp_path, monkeypatch, full):
    from dataclasses import replace

    # As if the weights were wide: each then has random directions of its own.
    monkeypatch.setattr(residual, "FULL", full)
    model, guard, optimizer = guarded(config=replace(CONFIG, coverage=0.5, project=False))
    own = [matrix.dim() == 3 for matrix in guard.view.residuals]
    assert any(own) == (full == 8)
    train(model, guard, optimizer, ["math"] * 6 + ["code"] * 6)
    guard.save(save_model(model, tmp_path))
    found = predict_interference(StateFile(tmp_path).domain("math"), open_checkpoint(tmp_path))
    live = guard.raw_parts(["math"])["math"]
    assert found.raw == pytest.approx(live.quadratic, rel=1e-4)
    masks = guard.domains["math"].protected_set.masks
    assert all(bool((part[~masks[name]] == 0).all()) for name, part in found.units.items())


def test_prediction_between_two_checkpoints_is_quadratic(toy_run, tmp_path):
    folder, _, _ = toy_run
    record = StateFile(folder / "phase-3").domain("math")
    a, b = (open_checkpoint(folder / f"phase-{index}") for index in (1, 3))
    half = Toy()
    half.load_state_dict({name: (a.rows(name) + b.rows(name)) / 2 for name in a.shapes})
    middle = open_checkpoint(save_model(half, tmp_path))
    whole = predict_interference(record, b, before=a).raw
    assert predict_interference(record, middle, before=a).raw == pytest.approx(whole / 4, rel=1e-3)
    assert predict_interference(record, a, before=a).raw == 0
    # Phase 1 ended at the anchor.
    assert whole == pytest.approx(predict_interference(record, b).raw, rel=1e-3)


def test_a_prediction_without_the_linear_part_has_the_slope_of_the_quadratic_one(toy_run):
    folder, _, _ = toy_run
    record = StateFile(folder / "phase-3").domain("math")
    pairs = {"xy": 1.0, "xx": 2.0, "ly": 2.0, "ll": 4.0, "lx": 1.0, "centre_loss": 0.5, "truth_xy": {}}
    for name, value in pairs.items():
        setattr(record.region, name, value)
    assert record.region.slopes[1] > 0
    a, b = (open_checkpoint(folder / f"phase-{index}") for index in (1, 3))
    since = predict_interference(record, b)
    assert since.calibrated == pytest.approx(record.region.spent + 0.5 * since.raw)
    # What was lost before the displacement is no cost of it.
    between = predict_interference(record, b, before=a)
    assert between.calibrated == pytest.approx(0.5 * between.raw)


def test_conflict_subspace_of_a_domain_with_itself(toy_run):
    folder, _, _ = toy_run
    state = StateFile(folder / "phase-3")
    before, after = (open_checkpoint(folder / f"phase-{index}") for index in (1, 2))
    own = conflict_subspace(state.domain("math"), state.domain("math"), before, after)
    for name, cosines in own.cosines.items():
        used = cosines[cosines > 1e-3]
        assert torch.allclose(used, torch.ones_like(used), atol=1e-4), name
    assert own.shared_interference == pytest.approx(own.inside_interference, rel=1e-4)
    other = conflict_subspace(state.domain("math"), state.domain("code"), before, after)
    assert other.share == pytest.approx(own.share)
    assert other.inside_interference == pytest.approx(own.inside_interference)
    assert own.inside_interference <= 1
    assert 0 < other.share < 1
    assert all(0 <= value <= 1 for value in other.chance.values())
    assert all(float(item.max()) <= 1 + 1e-5 for item in other.cosines.values())


def test_shared_interference_is_the_dense_form_on_the_shared_subspace(toy_run):
    folder, _, _ = toy_run
    state = StateFile(folder / "phase-3")
    before, after = (open_checkpoint(folder / f"phase-{index}") for index in (1, 2))
    found = conflict_subspace(state.domain("math"), state.domain("code"), before, after)
    theirs, shared = dict(state.domain("code").directions()), 0.0
    for part in state.domain("math").parts():
        name, block = part.view.name, part.block
        U, V = block.U[0].double(), theirs[name][0].double()
        # Directions in span(U) that make less than 45 degrees with span(V).
        values, vectors = torch.linalg.eigh(U.T @ V @ V.T @ U)
        P = U @ vectors[:, values > 0.5]
        D = part.view.view(after.rows(name) - before.rows(name)).double() @ P @ P.T
        H = U @ torch.diag(block.lam[0].double()) @ U.T
        scale = block.energy[0].double() * float(block.scale[0])
        shared += float((scale * ((D @ H) * D).sum(-1)).sum() / 2)
    whole = predict_interference(state.domain("math"), after, before=before).raw
    assert found.shared_interference == pytest.approx(shared / whole, rel=1e-3)


def test_stored_gradients_are_images_of_the_mean_gradient(toy_run):
    folder, _, guard = toy_run
    record = StateFile(folder / "phase-3").domain("math")
    stored = stored_gradients(record)
    live = guard.domains["math"].gradient
    for block, total in zip(guard.view.blocks, live.sums, strict=True):
        for view, piece in zip(block.views, total.chunk(len(block.views)), strict=True):
            assert torch.equal(stored[view.name], piece)
    own = gradient_cosines(stored, stored)
    assert own.whole == pytest.approx(1)
    opposite = gradient_cosines(stored, {name: -value for name, value in stored.items()})
    assert opposite.whole == pytest.approx(-1)
    assert opposite.most_conflicting[1] == pytest.approx(-1)


def test_cosines_of_sketches_estimate_those_of_gradients():
    from interference_guard.curvature import sketch_matrix

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 256, generator=generator)
    b = 0.6 * a + 0.8 * torch.randn(200, 256, generator=generator)
    omega = sketch_matrix(256, 32, 0)
    exact = gradient_cosines({"w": a}, {"w": b}).whole
    assert gradient_cosines({"w": a @ omega}, {"w": b @ omega}).whole == pytest.approx(exact, abs=0.05)


def test_state_without_gradients(tmp_path):
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 2)
    guard.save(tmp_path)
    with pytest.raises(StateError, match="kept with first_order=True alone"):
        stored_gradients(StateFile(tmp_path).domain("math"))


def test_domains_without_anchor_and_unknown_ones(toy_run):
    folder, _, _ = toy_run
    state = StateFile(folder / "phase-3")
    with pytest.raises(UnknownDomainError, match=r"'qa' has no anchor .* anchored are \['math', 'code'\]"):
        predict_interference(state.domain("qa"), open_checkpoint(folder / "phase-3"))
    with pytest.raises(UnknownDomainError, match=r"'art' is not in .* it knows \['code', 'math', 'qa'\]"):
        state.domain("art")


def test_state_of_another_model(toy_run, tmp_path):
    folder, _, _ = toy_run
    other = open_checkpoint(save_model(Toy(hidden=8), tmp_path))
    with pytest.raises(CheckpointError, match="are of different architectures"):
        predict_interference(StateFile(folder / "phase-3").domain("math"), other)


def copy(folder, tmp_path):
    for name in (DETAILS, TENSORS):
        shutil.copy(folder / "phase-3" / name, tmp_path / name)
    return tmp_path


def test_damaged_states(toy_run, tmp_path):
    folder = copy(toy_run[0], tmp_path)
    path, tensors = folder / DETAILS, folder / TENSORS
    text, data = path.read_text(), tensors.read_bytes()
    tensors.write_bytes(data + b"x")
    with pytest.raises(StateError, match="is damaged: it has"):
        StateFile(folder)
    # Of the same size, as those of two checkpoints in a row are.
    tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StateError, match="is damaged: it has"):
        StateFile(folder)
    tensors.write_bytes(data[:100])
    with pytest.raises(StateError, match="is damaged or no safetensors"):
        StateFile(folder)
    tensors.unlink()
    with pytest.raises(StateError, match="does not exist"):
        StateFile(folder)
    path.write_text(json.dumps({**json.loads(text), "version": 99}))
    with pytest.raises(StateVersionError, match="format version 99; this version reads 9"):
        StateFile(folder)
    for wrong in ("{", "[]", json.dumps({**json.loads(text), "format": "x"})):
        path.write_text(wrong)
        with pytest.raises(StateError, match="is damaged"):
            StateFile(folder)
    path.unlink()
    with pytest.raises(StateError, match="has no guard state"):
        StateFile(folder)


def test_a_state_that_cannot_be_read_is_not_called_damaged(toy_run, tmp_path):
    folder = copy(toy_run[0], tmp_path)
    with pytest.raises(StateError, match="has no guard state"):
        StateFile(folder / DETAILS)
    for name in (TENSORS, DETAILS):
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(StateError, match=f"{name} cannot be read: .* Check the path and its permissions"):
            StateFile(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table["domains"]["math"].pop("region"), "domain 'math' lacks an entry, .* 'region'"),
        (lambda table: table["domains"]["math"].pop("model"), "domain 'math' lacks an entry, .* 'model'"),
        (
            lambda table: table["domains"]["math"]["region"].update(new=1),
            "not known here .*'new'.* use the release",
        ),
        (lambda table: table["settings"].pop("seed"), "is damaged: KeyError: 'seed'"),
        (lambda table: table["settings"].update(rank=None), "is damaged: TypeError"),
    ],
)
def test_details_that_lack_an_entry_or_have_a_new_one(toy_run, tmp_path, change, message):
    path = copy(toy_run[0], tmp_path) / DETAILS
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(StateError, match=message):
        StateFile(tmp_path)


def test_conflict_subspace_of_two_models(toy_run, tmp_path):
    model = Toy()
    model.lm_head.weight.requires_grad_(False)
    guard = Guard(model, CONFIG)
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), guard)
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 2)
    guard.save(tmp_path)
    first, other = (StateFile(folder).domain("math") for folder in (toy_run[0] / "phase-3", tmp_path))
    before, after = (open_checkpoint(toy_run[0] / f"phase-{index}") for index in (1, 2))
    with pytest.raises(CheckpointError, match="are of different architectures. Give two domains of one run"):
        conflict_subspace(first, other, before, after)


def test_reading_changes_nothing(toy_run):
    folder, _, _ = toy_run
    before = {path.name: path.read_bytes() for path in (folder / "phase-3").iterdir()}
    record = StateFile(folder / "phase-3").domain("math")
    predict_interference(record, open_checkpoint(folder / "phase-3"))
    dict(record.directions())
    assert before == {path.name: path.read_bytes() for path in (folder / "phase-3").iterdir()}
    # What was read can still be loaded.
    from dataclasses import replace

    Guard(Toy(), replace(CONFIG, project=False, first_order=True)).load(folder / "phase-3")
