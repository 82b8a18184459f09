import json

import pytest
import torch
from safetensors.torch import save_file

from interference_guard.analysis import MergedCheckpoint, check_same, open_checkpoint
from interference_guard.analysis.checkpoints import pieces, place, resolve, unit_layout
from interference_guard.errors import CheckpointError
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


def test_shard_without_a_tensor_of_the_index(tmp_path):
    folder = save_model(Toy(), tmp_path, shards=2)
    path = folder / "model.safetensors.index.json"
    table = json.loads(path.read_text())
    table["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* 'ghost\.weight'"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
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


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
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


def test_transposed_layers_are_refused(tmp_path):
    folder = save_model(Toy(), tmp_path)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="is a gpt2 model, whose layers are stored transposed"):
        unit_layout(open_checkpoint(folder))
    assert unit_layout(open_checkpoint(folder), {"lm_head.weight": "column"}).views["lm_head.weight"].units == 16


def test_places_and_names():
    assert place("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight") == (3, "up_proj")
    assert place("lm_head.weight") == (None, "lm_head")
    assert resolve("a.weight", {"b.weight"}) is None


def adapter(folder, base, rank=2, **settings):
    generator = torch.Generator().manual_seed(1)
    prefix = "base_model.model.mlp.up_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(rank, 16, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(32, rank, generator=generator),
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 8, **settings}))
    return tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]


@pytest.mark.parametrize(("settings", "scale"), [({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5)])
def test_adapter_reads_as_merged(tmp_path, settings, scale):
    base = open_checkpoint(save_model(Toy(), tmp_path / "base"))
    product = adapter(tmp_path / "lora", base, **settings)
    merged = MergedCheckpoint(base, open_checkpoint(tmp_path / "lora"))
    expected = base.rows("mlp.up_proj.weight") + scale * product
    torch.testing.assert_close(merged.rows("mlp.up_proj.weight", 3, 9), expected[3:9])
    assert torch.equal(merged.rows("lm_head.weight"), base.rows("lm_head.weight"))
    assert merged.shapes == base.shapes


def test_adapters_that_cannot_be_merged(tmp_path):
    base = open_checkpoint(save_model(Toy(), tmp_path / "base"))
    adapter(tmp_path / "dora", base, use_dora=True)
    with pytest.raises(CheckpointError, match="sets use_dora; only plain LoRA"):
        MergedCheckpoint(base, open_checkpoint(tmp_path / "dora"))
    adapter(tmp_path / "lora", base)
    other = open_checkpoint(save_model(Toy(hidden=8), tmp_path / "other"))
    with pytest.raises(CheckpointError, match="different architectures"):
        MergedCheckpoint(other, open_checkpoint(tmp_path / "lora"))
    (tmp_path / "lora/adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        MergedCheckpoint(base, open_checkpoint(tmp_path / "lora"))
