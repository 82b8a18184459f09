import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from interference_guard.analysis import MergedCheckpoint, check_same, measure_edits, open_checkpoint
from interference_guard.analysis.checkpoints import pieces, resolve, unit_layout
from interference_guard.errors import CheckpointError
from interference_guard.places import place
from interference_guard.units import UnitLayout
from tests.unit.helpers import Toy
from tests.unit.runs import save_model


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_saved(tmp_path, shards, dtype):
    model = Toy()
    opened = open_checkpoint(save_model(model, tmp_path / "m", shards, dtype))
    assert dict(opened.shapes) == {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, value in model.state_dict().items():
        assert torch.equal(opened.rows(name), value.to(dtype).float())
        assert torch.equal(opened.rows(name, 2, 5), value.to(dtype).float()[2:5])


def test_a_single_file_is_a_checkpoint(tmp_path):
    folder = save_model(Toy(), tmp_path)
    assert open_checkpoint(folder / "model.safetensors").shapes == open_checkpoint(folder).shapes


def test_pieces_cover_every_row_once():
    assert list(pieces((10, 4), limit=12)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(pieces((2, 100), limit=12)) == [(0, 1), (1, 2)]
    assert list(pieces((), limit=12)) == [(0, 1)]


def test_missing_shard(tmp_path):
    folder = save_model(Toy(), tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 shards .* 'model-00002-of-00003"):
        open_checkpoint(folder)


def test_an_index_that_an_earlier_save_left_is_passed_over(tmp_path):
    save_model(Toy(seed=0), tmp_path, shards=2)
    model = Toy(seed=1)
    found = open_checkpoint(save_model(model, tmp_path))
    assert torch.equal(found.rows("lm_head.weight"), model.lm_head.weight.detach())


def test_shard_without_a_tensor_of_the_index(tmp_path):
    folder = save_model(Toy(), tmp_path, shards=2)
    path = folder / "model.safetensors.index.json"
    table = json.loads(path.read_text())
    table["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* 'ghost\.weight'"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": "/b"}}']
)
def test_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -40])
def test_truncated_file(tmp_path, keep):
    path = save_model(Toy(), tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        open_checkpoint(tmp_path)


def test_tensors_without_elements_are_passed_over(tmp_path):
    weights = {"a.weight": torch.ones(3, 2), "empty": torch.ones(3, 0), "none": torch.ones(0, 3)}
    save_file(weights, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    assert dict(found.shapes) == {"a.weight": (3, 2)}
    assert measure_edits(found, found).summary()["equal"] == 1


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    save_model(Toy(), tmp_path / "checkpoint-2", shards=2)
    save_model(Toy(), tmp_path / "checkpoint-1")
    with pytest.raises(
        CheckpointError, match=r"itself, but some in the folders \['checkpoint-1', 'checkpoint-2'\]"
    ):
        open_checkpoint(tmp_path)
    save_file({"ids": torch.arange(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no floating-point tensor"):
        open_checkpoint(tmp_path)


def test_weights_that_are_not_finite(tmp_path):
    model = Toy()
    model.lm_head.weight.data[1, 2] = torch.nan
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN or infinity"):
        open_checkpoint(save_model(model, tmp_path)).rows("lm_head.weight")


def test_different_architectures(tmp_path):
    a = open_checkpoint(save_model(Toy(), tmp_path / "a"))
    b = open_checkpoint(save_model(Toy(hidden=8), tmp_path / "b"))
    with pytest.raises(CheckpointError, match=r"different architectures: .* shape \(12, 16\)"):
        check_same(a, b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_packed_weights(tmp_path, dtype):
    tensors = {"up_proj.weight": torch.ones(8, 4, dtype=dtype), "up_proj.absmax": torch.ones(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"packed weights: 'up_proj\.weight' has shape \(8, 4\).*dequantized"
    ):
        open_checkpoint(tmp_path)


def test_packed_weights_that_the_configuration_tells_of(tmp_path):
    save_model(Toy(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(CheckpointError, match=r"its config\.json has a quantization_config"):
        open_checkpoint(tmp_path)


def test_positions_and_masks_are_not_packed_weights(tmp_path):
    tensors = {
        "a.weight": torch.ones(2, 2),
        "position_ids": torch.arange(4).unsqueeze(0),
        "index": torch.zeros(3, 3, dtype=torch.int64),
        "bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "mask": torch.ones(4, 4, dtype=torch.bool),
        "count": torch.ones(3, dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).shapes) == ["a.weight"]


def tied(folder, model, *, head, config=True):
    """A model of which the head is the embedding; `head` stores it twice."""
    tensors = {"model.embed_tokens.weight": model.embed.weight.detach().clone()}
    if head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": config}))
    return open_checkpoint(folder)


@pytest.mark.parametrize("config", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("twice", [(True, False), (False, True)])
def test_a_tied_head_may_be_stored_on_one_side_alone(tmp_path, config, twice):
    a, b = (
        tied(tmp_path / str(index), Toy(index), head=head, config=says)
        for index, (head, says) in enumerate(zip(twice, config, strict=True))
    )
    check_same(a, b)
    assert list(measure_edits(a, b).parameters) == ["model.embed_tokens.weight"]


def test_a_head_of_its_own_is_not_left_out(tmp_path):
    a, b = (tied(tmp_path / str(head), Toy(), head=head, config=False) for head in (True, False))
    with pytest.raises(CheckpointError, match=r"1 of 2 tensors differ, for instance 'lm_head\.weight'"):
        check_same(a, b)
    save_model(Toy(), tmp_path / "toy")
    (tmp_path / "toy/config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    # The sizes may be those of an embedding and its head, but nothing here has the name of one.
    with pytest.raises(CheckpointError, match="different architectures"):
        check_same(open_checkpoint(tmp_path / "toy"), b)


# peft and transformers warn about what a toy does not have.
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@quiet
@pytest.mark.parametrize("kind", [GPT2Config, Qwen3Config])
def test_files_are_laid_out_as_the_model_is(tmp_path, kind):
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 2} if kind is GPT2Config else {
        "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
        "intermediate_size": 24, "head_dim": 4,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(kind(vocab_size=16, **sizes))
    model.save_pretrained(tmp_path)
    expected = UnitLayout(model.named_parameters(), module=model).views
    assert any(view.neuron for view in expected.values())
    found = unit_layout(open_checkpoint(tmp_path)).views
    assert found == expected
    # Without the configuration, an override says it.
    if kind is GPT2Config:
        (tmp_path / "config.json").unlink()
        plain = unit_layout(open_checkpoint(tmp_path)).views
        name = "transformer.h.0.attn.c_attn.weight"
        assert plain[name] != expected[name]
        assert unit_layout(open_checkpoint(tmp_path), {"*.c_attn.weight": "column"}).views[name] == expected[name]


def test_places_and_names():
    assert place("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight") == (3, "up_proj")
    assert place("lm_head.weight") == (None, "lm_head")
    assert resolve("a.weight", {"b.weight"}) is None


def trained_adapter(model, folder, **settings):
    """A LoRA adapter with random factors; its file, and the model with it merged by peft."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, **settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload().state_dict()


def assert_merged(base, folder, expected, changed):
    merged = MergedCheckpoint(base, open_checkpoint(folder))
    assert merged.shapes == base.shapes
    for name in base.shapes:
        torch.testing.assert_close(merged.rows(name), expected[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged.rows(name, 2, 5), expected[name][2:5], rtol=1e-5, atol=1e-5)
    moved = {name for name in base.shapes if not torch.equal(merged.rows(name), base.rows(name))}
    assert {name.removesuffix(".weight") for name in moved} == set(changed)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"mlp.down_proj": 1}},
        {"rank_pattern": {"mlp.*": 4}, "alpha_pattern": {"^mlp.up_proj": 2}, "use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed", "up_proj"]},
    ],
    ids=str,
)
@quiet
def test_adapter_reads_as_peft_merges_it(tmp_path, settings):
    model = Toy()
    base = open_checkpoint(save_model(model, tmp_path / "base"))
    settings = {"target_modules": ["up_proj", "down_proj"], **settings}
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
    expected = trained_adapter(model, tmp_path / "lora", **settings)
    names = {"embed": "embed", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj"}
    changed = [names[name] for name in settings["target_modules"]] + settings.get("modules_to_save", [])
    assert_merged(base, tmp_path / "lora", expected, changed)


@pytest.mark.parametrize("layers", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head"]], ids=str)
@quiet
def test_adapter_that_brings_the_weight_beside_its_factors(tmp_path, layers):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    config = Qwen3Config(vocab_size=16, num_hidden_layers=1, head_dim=8, tie_word_embeddings=False, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    expected = trained_adapter(model, tmp_path / "lora", target_modules=layers)
    # peft's names for what it calls the embedding layers: it saves those whole.
    assert any(".base_layer." in name for name in open_checkpoint(tmp_path / "lora").shapes)
    names = {
        "lm_head": "lm_head",
        "embed_tokens": "model.embed_tokens",
        "q_proj": "model.layers.0.self_attn.q_proj",
    }
    assert_merged(base, tmp_path / "lora", expected, [names[layer] for layer in layers])


@quiet
def test_adapter_of_a_model_that_is_stored_transposed(tmp_path):
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=16, n_embd=8, n_head=2, n_layer=1))
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    # c_proj of the attention is square: its shape does not tell how it is stored.
    layers = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    expected = trained_adapter(model, tmp_path / "lora", **layers)
    block = "transformer.h.0"
    changed = [f"{block}.attn.c_attn", f"{block}.attn.c_proj", f"{block}.mlp.c_fc", f"{block}.mlp.c_proj"]
    assert_merged(base, tmp_path / "lora", expected, changed)
    # Nor is the configuration of the base needed.
    (tmp_path / "base/config.json").unlink()
    assert_merged(open_checkpoint(tmp_path / "base"), tmp_path / "lora", expected, changed)


@quiet
def test_several_adapters_in_one_folder(tmp_path):
    wrapped = get_peft_model(Toy(), LoraConfig(r=2, target_modules=["up_proj"]), adapter_name="first")
    wrapped.add_adapter("second", LoraConfig(r=3, target_modules=["down_proj"]))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"some in the folders \['first', 'second'\]. Give one"):
        open_checkpoint(tmp_path)
    base = open_checkpoint(save_model(Toy(), tmp_path / "base"))
    assert MergedCheckpoint(base, open_checkpoint(tmp_path / "second")).shapes == base.shapes


def adapter(folder, rank=2, **settings):
    """Factors for up_proj, and a configuration."""
    prefix = "base_model.model.mlp.up_proj"
    tensors = {f"{prefix}.lora_A.weight": torch.randn(rank, 16), f"{prefix}.lora_B.weight": torch.randn(32, rank)}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 8, **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "the adapter is of the kind LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' has changed the base"),
        ({"lora_bias": True}, "lora_bias is set and its factors have biases"),
        ({"target_parameters": ["x"]}, "target_parameters is set"),
        ({"rank_pattern": {"up_proj": 5}}, "have rank 2 and 2, adapter_config.json says 5"),
        ({"lora_alpha": "much"}, r"adapter_config\.json cannot be read: ValueError"),
        ({"rank_pattern": [1]}, r"adapter_config\.json cannot be read: AttributeError"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_merged(tmp_path, settings, message):
    base = open_checkpoint(save_model(Toy(), tmp_path / "base"))
    adapter(tmp_path / "lora", **settings)
    with pytest.raises(CheckpointError, match=message):
        MergedCheckpoint(base, open_checkpoint(tmp_path / "lora"))


def test_adapters_that_do_not_fit(tmp_path):
    base = open_checkpoint(save_model(Toy(), tmp_path / "base"))
    adapter(tmp_path / "lora")
    other = open_checkpoint(save_model(Toy(hidden=8), tmp_path / "other"))
    with pytest.raises(CheckpointError, match="different architectures"):
        MergedCheckpoint(other, open_checkpoint(tmp_path / "lora"))
    save_file({"else.weight": torch.ones(2, 2)}, tmp_path / "alien.safetensors")
    with pytest.raises(CheckpointError, match=r"changes 'mlp\.up_proj\.weight', which"):
        MergedCheckpoint(open_checkpoint(tmp_path / "alien.safetensors"), open_checkpoint(tmp_path / "lora"))
    (tmp_path / "lora/adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        MergedCheckpoint(base, open_checkpoint(tmp_path / "lora"))
