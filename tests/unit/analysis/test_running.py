"""Runs of models whose weights transformers saves under other names, or in other pieces, than in memory."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    OlmoHybridConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from interference_guard import Guard, GuardConfig, GuardedOptimizer
from interference_guard.analysis import (
    MergedCheckpoint,
    StateFile,
    conflict_subspace,
    open_checkpoint,
    plan_rollback,
    predict_interference,
    write_rollback,
)
from interference_guard.analysis.running import find_source
from interference_guard.cli import main
from interference_guard.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def qwen():
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=8, head_dim=8, num_experts=4, num_experts_per_tok=2)
    )


def gemma():
    text = SIZES | {"head_dim": 8, "sliding_window": 8}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=vision | {"image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=5,
            boi_token_index=6,
            eoi_token_index=7,
        )
    )


def loss_of(model, ids):
    text = getattr(model.model, "language_model", model.model)
    scores = model.lm_head(text(input_ids=ids[:, :-1]).last_hidden_state)
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture(scope="module", params=[mixtral, qwen, gemma], ids=["mixtral", "qwen3_moe", "gemma3"])
def run(request, tmp_path_factory):
    """Folders after each of two domains, in shards so small that they part the experts; the model, the guard."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    torch.manual_seed(0)
    model = request.param()
    for name, weight in model.named_parameters():
        weight.requires_grad_("vision" not in name and "multi_modal" not in name)
    guard = Guard(model, GuardConfig(rank=4, sketch=6, residual=4, project=False))
    optimizer = GuardedOptimizer(
        torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=3e-3), guard
    )
    for step in range(10):
        low = 8 if step < 5 else 20
        ids = torch.randint(low, low + 12, (4, 8), generator=torch.Generator().manual_seed(step))
        with guard.domain("math" if step < 5 else "code"):
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step in (4, 9):
            name = "before" if step == 4 else "after"
            model.save_pretrained(folder / name, max_shard_size="10KB")
            guard.save(folder / name)
    return folder, model, guard


def opened(folder):
    return StateFile(folder / "after"), *(open_checkpoint(folder / name) for name in ("before", "after"))


def test_weights_are_those_in_memory(run):
    folder, model, _ = run
    state, _, after = opened(folder)
    found = state.running(after)
    names = dict(model.named_parameters())
    assert set(found.shapes) == {name for name, weight in names.items() if weight.requires_grad}
    assert not set(found.shapes) <= set(after.shapes), "the file has other names"
    for name, shape in found.shapes.items():
        assert torch.equal(found.rows(name), names[name].detach()), name
        if len(shape) == 3:
            assert torch.equal(found.rows(name, 1, 3), names[name].detach()[1:3])


def test_predictions_are_the_guard_s(run, capsys):
    folder, _, guard = run
    state, before, after = opened(folder)
    live = guard.raw_parts(["math"])["math"].quadratic
    assert predict_interference(state.domain("math"), after).raw == pytest.approx(live, rel=1e-3)
    assert predict_interference(state.domain("math"), after, before=before).raw == pytest.approx(live, rel=1e-3)
    assert 0 < conflict_subspace(state.domain("math"), state.domain("code"), before, after).share < 1
    words = [str(folder / "before"), str(folder / "after"), "--state", str(folder / "after"), "--json"]
    assert main(["compare", *words]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["predictions"]
    assert shown["raw"] == pytest.approx(live, rel=1e-3)


def test_a_rollback_has_the_files_names_and_numbers_of_its_source(run, tmp_path):
    folder, model, _ = run
    state, before, after = opened(folder)
    plan = plan_rollback(state.domain("math"), before, after, "units")
    assert write_rollback(plan, 1.0, 1.0, tmp_path / "out")["interference_left"] == 0
    assert {item.name for item in (tmp_path / "out").iterdir()} == {
        item.name for item in (folder / "after").iterdir() if not item.name.startswith("interference_guard")
    }
    written = open_checkpoint(tmp_path / "out")
    assert written.shapes == after.shapes
    old, new, loaded = (
        dict(type(model).from_pretrained(item).named_parameters())
        for item in (folder / "before", folder / "after", tmp_path / "out")
    )
    back = 0
    for name, weight in loaded.items():
        assert bool(((weight == old[name]) | (weight == new[name])).all()), name
        back += int(not torch.equal(weight, new[name]))
    assert back == len(state.views)


def test_a_checkpoint_that_lacks_an_expert_or_a_layer_is_refused(run):
    folder, _, _ = run
    state, _, after = opened(folder)
    name = next((name for name, view in state.views.items() if view.stacked), "model.language_model.norm.weight")
    lost = ".experts.3." if state.views[name].stacked else ".model.norm."
    shapes = {there: shape for there, shape in after.shapes.items() if lost not in there}
    assert len(shapes) < len(after.shapes)
    assert find_source(name, state.views[name].shape, shapes) is None
    after._shapes = shapes
    with pytest.raises(CheckpointError, match="are of different architectures"):
        state.running(after)


def test_an_adapter_is_merged_with_a_base_of_other_names(tmp_path):
    model = gemma()
    model.save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    adapted = get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = MergedCheckpoint(*(open_checkpoint(tmp_path / name) for name in ("base", "adapter")))
    expected = dict(adapted.merge_and_unload().named_parameters())
    name = "layers.1.self_attn.q_proj.weight"
    found = merged.rows(f"language_model.model.{name}")
    torch.testing.assert_close(found, expected[f"model.language_model.{name}"].detach())


EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
MAMBA = {"mamba_num_heads": 2, "mamba_head_dim": 16, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 4}
OTHERS = {
    "ernie": Ernie4_5_MoeConfig(**SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=8),
    "olmo_hybrid": OlmoHybridConfig(**SIZES | {"num_hidden_layers": 4, "pad_token_id": 0}),
    "nemotron_h": NemotronHConfig(
        **SIZES | EXPERTS | MAMBA | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "moe", "attention"]},
        head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        moe_shared_expert_intermediate_size=8,
        topk_group=1,
        n_group=1,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_parameter_is_found_in_the_file(name, tmp_path):
    model = AutoModelForCausalLM.from_config(OTHERS[name])
    model.save_pretrained(tmp_path)
    saved = open_checkpoint(tmp_path)
    names = dict(model.named_parameters())
    assert not set(names) <= set(saved.shapes), "the file has other names"
    for parameter, weight in names.items():
        source = find_source(parameter, tuple(weight.shape), saved.shapes)
        assert source is not None, parameter
        assert torch.equal(source.read(saved.rows), weight.detach().float()), parameter
