import subprocess
import sys

import pytest
import torch

from benchmarks.tooling import save_sharded
from interference_guard.analysis import checkpoints, jaccard, measure_edits, open_checkpoint, top_neurons
from interference_guard.analysis import edits as module
from tests.unit.analysis.peaks import PEAK, told
from tests.unit.helpers import Toy
from tests.unit.runs import save_model


def pair(tmp_path, change):
    before, after = Toy(), Toy()
    with torch.no_grad():
        change(after)
    paths = [save_model(model, tmp_path / name) for model, name in ((before, "a"), (after, "b"))]
    return before, after, measure_edits(*map(open_checkpoint, paths))


def test_shares_follow_the_two_bounds(tmp_path):
    def change(model):
        weight = model.lm_head.weight
        weight.fill_(1.0)

    def set_before(model):
        model.lm_head.weight.fill_(1.0)
        # Of 192: one far, one under both (float32 keeps 1e-8 only near 0), one under the relative bound alone.
        model.lm_head.weight[0, 0] = 2.0
        model.lm_head.weight[0, 1] = 1.0005

    before, after = Toy(), Toy()
    with torch.no_grad():
        change(before)
        set_before(after)
        before.lm_head.weight[1, 0] = 1e-3
        after.lm_head.weight[1, 0] = 1e-3 + 2e-8
        before.lm_head.weight[1, 1] = after.lm_head.weight[1, 1] = 0.0
    a, b = (save_model(model, tmp_path / name) for model, name in ((before, "a"), (after, "b")))
    found = measure_edits(open_checkpoint(a), open_checkpoint(b)).parameters["lm_head.weight"]
    assert found.elements == 192
    assert found.equal == 189
    assert found.under_both == 190
    assert found.close == 191


@pytest.mark.parametrize("limit", [16, 1 << 24])
def test_unit_energies_are_those_of_the_dense_difference(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(module, "pieces", lambda shape: checkpoints.pieces(shape, limit))

    def change(model):
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    before, after, found = pair(tmp_path, change)
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    for name, item in found.parameters.items():
        dense = item.view.view(new[name].detach().double() - old[name].detach().double()).square().sum(-1)
        torch.testing.assert_close(item.units, dense.flatten(), rtol=1e-5, atol=1e-9)
        assert item.before == pytest.approx(float(old[name].detach().square().sum()), rel=1e-5)
    up, down = (
        (new[f"mlp.{name}.weight"] - old[f"mlp.{name}.weight"]).detach() for name in ("up_proj", "down_proj")
    )
    neurons = (up.square().sum(1) + down.square().sum(0)).sqrt().double()
    torch.testing.assert_close(found.neurons()["mlp"], neurons, rtol=1e-5, atol=1e-8)
    whole = sum(float(item.units.sum()) for item in found.parameters.values())
    assert found.summary()["norm"] == pytest.approx(whole**0.5)


def test_top_neurons_are_the_most_changed(tmp_path):
    def change(model):
        model.mlp["up_proj"].weight[5] += 1
        model.mlp["down_proj"].weight[:, 7] += 1
        model.mlp["up_proj"].weight[9] += 0.01

    _, _, found = pair(tmp_path, change)
    assert set(top_neurons(found.neurons(), 2 / 32)["mlp"].nonzero().flatten().tolist()) == {5, 7}
    assert found.by_place()["up_proj"]["equal"] == pytest.approx(30 / 32)


def test_top_neurons_that_did_not_change_are_none(tmp_path):
    def change(model):
        model.mlp["up_proj"].weight[5] += 1

    _, _, found = pair(tmp_path, change)
    # A tenth of the 32 would be three.
    assert top_neurons(found.neurons())["mlp"].nonzero().flatten().tolist() == [5]
    _, _, same = pair(tmp_path / "same", lambda model: None)
    assert not top_neurons(same.neurons())["mlp"].any()


def test_jaccard_of_disjoint_and_empty_sets():
    a, b = {"m": torch.tensor([True, False])}, {"m": torch.tensor([False, True])}
    assert jaccard(a, b) == 0
    assert jaccard(a, a) == 1
    assert jaccard({}, {}) == 0


def test_stacks_of_experts(tmp_path):
    class Experts(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.experts = torch.nn.ParameterDict(
                {"gate_up_proj": torch.randn(3, 8, 5), "down_proj": torch.randn(3, 5, 4)}
            )

    models = [Experts(seed) for seed in (0, 1)]
    paths = [save_model(model, tmp_path / str(index)) for index, model in enumerate(models)]
    found = measure_edits(*map(open_checkpoint, paths))
    for name, item in found.parameters.items():
        a, b = (dict(model.named_parameters())[name].detach().double() for model in models)
        torch.testing.assert_close(item.units, item.view.view(b - a).square().sum(-1).flatten())
    assert len(found.neurons()["experts"]) == 12


@told
def test_memory_does_not_grow_with_the_model(tmp_path):
    # 60 million parameters, 240 MB in fp32 each: whole models in memory would pass the bound.
    save_sharded(tmp_path / "a", 8e7, 1, 0.0)
    save_sharded(tmp_path / "b", 8e7, 2, 0.2)
    code = (
        f"{PEAK}from interference_guard.analysis import measure_edits, open_checkpoint\n"
        "before = peak()\n"
        "found = measure_edits(open_checkpoint(sys.argv[1]), open_checkpoint(sys.argv[2]))\n"
        "sys.stdout.write(f\"{peak() - before} {found.summary()['equal']}\")"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a", tmp_path / "b"], capture_output=True, text=True, check=True
    )
    grown, equal = run.stdout.split()
    assert int(grown) < 600e6
    assert 0.75 < float(equal) < 0.9
