"""Saved runs of models whose files do not tell how they are laid out: LoRA factors, layers stored transposed."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config

from interference_guard import Guard, GuardConfig, GuardedOptimizer
from interference_guard.analysis import (
    StateFile,
    conflict_subspace,
    measure_edits,
    open_checkpoint,
    predict_interference,
)
from interference_guard.checkpoint import DETAILS
from interference_guard.cli import main
from interference_guard.errors import StateError
from tests.unit.helpers import CONFIG, Toy, train
from tests.unit.runs import save_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def two_phases(folder, steps, **settings):
    """Adapters after each of two domains, with the guard's state beside them; the guard."""
    torch.manual_seed(0)
    model = get_peft_model(Toy(), LoraConfig(r=4, lora_alpha=8, **settings))
    guard = Guard(model, CONFIG)
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), guard)
    for index, name in enumerate(("math", "code")):
        train(model, guard, optimizer, [name] * steps, start=steps * index)
        model.save_pretrained(folder / name)
        guard.save(folder / name)
    return guard


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """Adapters after each of two phases, the guard's state beside the last, and the base model."""
    folder = tmp_path_factory.mktemp("lora")
    save_model(Toy(), folder / "base")
    return folder, two_phases(folder, 15, target_modules=["up_proj", "down_proj", "lm_head"])


def as_json(capsys, *words):
    assert main([*map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_adapters_are_compared_with_their_base_as_if_merged(lora_run, capsys):
    folder, guard = lora_run
    words = (folder / "base", folder / "math", folder / "code", "--state", folder / "code")
    found = as_json(capsys, "compare", *words)
    assert set(found["edits"][0]["places"]) == {"embed", "up_proj", "down_proj", "lm_head", "norm"}
    assert found["edits"][0]["places"]["embed"]["equal"] == 1
    assert found["edits"][1]["places"]["up_proj"]["norm"] > 0
    assert len(found["top_neurons"]) == 1
    # The guard watched the factors, so these are what its prediction is of.
    last = [item for item in found["predictions"] if item["after"].endswith("code")]
    assert [item["domain"] for item in last] == ["math"]
    assert last[0]["raw"] == pytest.approx(guard.raw("math"), rel=1e-4)


def test_rollback_of_adapters_writes_an_adapter(lora_run, capsys, tmp_path):
    folder, _ = lora_run
    words = (
        "rollback",
        folder / "math",
        folder / "code",
        "--domain",
        "math",
        "--share",
        "1",
        "-o",
        tmp_path / "out",
    )
    said = as_json(capsys, *words)["rollback"][0]
    record = StateFile(folder / "code").domain("math")
    whole, left = (
        predict_interference(record, open_checkpoint(path)).raw for path in (folder / "code", tmp_path / "out")
    )
    assert left / whole == pytest.approx(said["interference_left"], abs=0.02)
    assert said["interference_left"] < 0.5
    assert (tmp_path / "out/adapter_config.json").is_file()
    get_peft_model(Toy(), LoraConfig(r=4, target_modules=["up_proj", "down_proj", "lm_head"])).load_adapter(
        str(tmp_path / "out"), "restored"
    )


def test_rollback_of_an_adapter_to_its_base_is_refused(lora_run, capsys):
    folder, _ = lora_run
    assert main(["rollback", str(folder / "base"), str(folder / "code"), "--domain", "math", "--dry-run"]) == 2
    assert "Give a checkpoint of the guarded run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["up_proj", "embed", "lm_head"]},
        {"target_modules": ["up_proj"], "trainable_token_indices": {"embed": [1, 2]}},
    ],
    ids=["whole head", "embedding and head", "single tokens"],
)
def test_adapters_with_more_than_the_factors_of_layers(tmp_path, settings, capsys):
    guard = two_phases(tmp_path, 10, **settings)
    before, after = (open_checkpoint(tmp_path / name) for name in ("math", "code"))
    state = StateFile(tmp_path / "code")
    assert predict_interference(state.domain("math"), after).raw == pytest.approx(guard.raw("math"), rel=1e-3)
    conflict = conflict_subspace(state.domain("math"), state.domain("code"), before, after)
    assert set(conflict.cosines) <= set(state.views)
    words = ("rollback", tmp_path / "math", tmp_path / "code", "--domain", "math", "--mode", "units")
    said = as_json(capsys, *words, "--share", "1", "-o", tmp_path / "out")["rollback"][0]
    assert said["interference_left"] == pytest.approx(0, abs=1e-6)
    assert open_checkpoint(tmp_path / "out").shapes == after.shapes


@pytest.fixture(scope="module")
def transposed_run(tmp_path_factory):
    """A tiny GPT-2 after two domains, and its guard."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_head=2, n_layer=2)
    )
    model.save_pretrained(folder / "before")
    guard = Guard(model, GuardConfig(rank=4, sketch=6, residual=4))
    optimizer = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), guard)
    for step in range(8):
        ids = torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(step))
        with guard.domain("math" if step < 4 else "code"):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder / "after")
    guard.save(folder / "after")
    return folder, guard


def test_a_state_says_which_layers_are_stored_transposed(transposed_run):
    folder, guard = transposed_run
    state = StateFile(folder / "after")
    assert state.views == guard.view.layout.views
    assert any(name.endswith("c_attn") for name in guard.view.layout.transposed)
    found = predict_interference(state.domain("math"), open_checkpoint(folder / "after"))
    assert found.raw == pytest.approx(guard.raw("math"), rel=1e-3)
    layers = {place for place in state.domain("math").projected_places() if place[0] is not None}
    assert {(0, "c_attn"), (1, "attn.c_proj"), (1, "mlp.c_proj")} <= layers
    edits = measure_edits(open_checkpoint(folder / "before"), open_checkpoint(folder / "after"))
    assert set(edits.neurons()) == {"transformer.h.0.mlp", "transformer.h.1.mlp"}


def test_a_state_that_says_otherwise_is_refused_with_the_way_out(transposed_run, tmp_path):
    folder, _ = transposed_run
    for file in (folder / "after").glob("interference_guard*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    table = json.loads((tmp_path / DETAILS).read_text())
    table["transposed"] = []
    (tmp_path / DETAILS).write_text(json.dumps(table))
    with pytest.raises(StateError, match=r"layers are stored transposed.*give unit_overrides"):
        StateFile(tmp_path).domain("math").energies()
