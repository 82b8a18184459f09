"""Unit views of every parameter of the supported architectures, built tiny from their configs."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from interference_guard import Guard, GuardConfig, UnsupportedError
from interference_guard.units import UnitLayout
from tests.trl.supervised import supervised_step

H, INTER, V, L = 16, 24, 40, 2
COMMON = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": INTER,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
# By the end of a name: kind, units, width, and whether the units are part of a neuron.
LLAMA = {
    "embed_tokens.weight": ("row", V, H, False),
    "lm_head.weight": ("row", V, H, False),
    "q_proj.weight": ("row", 16, H, False),
    "k_proj.weight": ("row", 8, H, False),
    "v_proj.weight": ("row", 8, H, False),
    "o_proj.weight": ("column", 16, H, False),
    "gate_proj.weight": ("row", INTER, H, True),
    "up_proj.weight": ("row", INTER, H, True),
    "down_proj.weight": ("column", INTER, H, True),
    "layernorm.weight": ("vector", 1, H, False),
    "norm.weight": ("vector", 1, H, False),
}
QWEN2 = LLAMA | {
    "q_proj.bias": ("vector", 1, 16, False),
    "k_proj.bias": ("vector", 1, 8, False),
    "v_proj.bias": ("vector", 1, 8, False),
}
QWEN3 = LLAMA | {"q_norm.weight": ("vector", 1, 4, False), "k_norm.weight": ("vector", 1, 4, False)}
PHI = {
    "embed_tokens.weight": ("row", V, H, False),
    "lm_head.weight": ("row", V, H, False),
    "lm_head.bias": ("vector", 1, V, False),
    "q_proj.weight": ("row", 16, H, False),
    "k_proj.weight": ("row", 8, H, False),
    "v_proj.weight": ("row", 8, H, False),
    "q_proj.bias": ("vector", 1, 16, False),
    "k_proj.bias": ("vector", 1, 8, False),
    "v_proj.bias": ("vector", 1, 8, False),
    "dense.weight": ("column", 16, H, False),
    "dense.bias": ("vector", 1, H, False),
    "fc1.weight": ("row", INTER, H, True),
    "fc1.bias": ("vector", 1, INTER, False),
    "fc2.weight": ("column", INTER, H, True),
    "fc2.bias": ("vector", 1, H, False),
    "layernorm.weight": ("vector", 1, H, False),
    "layernorm.bias": ("vector", 1, H, False),
}
PHI3 = {
    **{key: LLAMA[key] for key in ("embed_tokens.weight", "lm_head.weight", "o_proj.weight", "down_proj.weight")},
    "qkv_proj.weight": ("row", 32, H, False),
    "gate_up_proj.weight": ("row", 2 * INTER, H, True),
    "layernorm.weight": ("vector", 1, H, False),
    "norm.weight": ("vector", 1, H, False),
}
# Conv1D stores (in, out): a unit that reads is a column in memory, one that writes a row.
GPT2 = {
    "wte.weight": ("row", V, H, False),
    "wpe.weight": ("row", 32, H, False),
    "c_attn.weight": ("column", 3 * H, H, False),
    "c_attn.bias": ("vector", 1, 3 * H, False),
    "attn.c_proj.weight": ("row", H, H, False),
    "c_fc.weight": ("column", 4 * H, H, True),
    "c_fc.bias": ("vector", 1, 4 * H, False),
    "mlp.c_proj.weight": ("row", 4 * H, H, True),
    "c_proj.bias": ("vector", 1, H, False),
    "ln_1.weight": ("vector", 1, H, False),
    "ln_1.bias": ("vector", 1, H, False),
    "ln_2.weight": ("vector", 1, H, False),
    "ln_2.bias": ("vector", 1, H, False),
    "ln_f.weight": ("vector", 1, H, False),
    "ln_f.bias": ("vector", 1, H, False),
}
E_, M = 4, 12


def without(table, *parts):
    return {name: view for name, view in table.items() if not any(part in name for part in parts)}


def stacks(channels):
    return {
        "experts.gate_up_proj": ("row", E_ * 2 * channels, H, True),
        "experts.down_proj": ("column", E_ * channels, H, True),
    }


# Stored (in, out), and their units stand alone.
TRANSPOSED = {
    "router.weight": ("row", E_, H, False),
    "experts.gate_up_proj": ("column", E_ * 2 * INTER, H, False),
    "experts.down_proj": ("row", E_ * INTER, H, False),
}
ROUTER = {"gate.weight": ("row", E_, H, False)}
QWEN3_MOE = without(QWEN3, "gate_proj", "up_proj") | ROUTER | stacks(M)
MIXTRAL = without(LLAMA, "gate_proj", "up_proj", "down_proj") | ROUTER | stacks(INTER)
GPT_OSS = {
    **without(QWEN2, "gate", "up_proj"),
    **TRANSPOSED,
    "o_proj.bias": ("vector", 1, H, False),
    "sinks": ("vector", 1, 4, False),
    "router.bias": ("vector", 1, E_, False),
    "experts.gate_up_proj_bias": ("row", E_, 2 * INTER, False),
    "experts.down_proj_bias": ("row", E_, H, False),
}
LLAMA4 = LLAMA | TRANSPOSED
GRANITE_MOE = {
    **without(LLAMA, "gate", "up_proj"),
    "router.layer.weight": ("row", E_, H, False),
    "input_linear.weight": ("row", E_ * 2 * INTER, H, True),
    "output_linear.weight": ("column", E_ * INTER, H, True),
    # The names that later versions of transformers give them.
    "router.weight": ("row", E_, H, False),
    **stacks(INTER),
}
CASES = {
    "llama": (transformers.LlamaConfig(**COMMON), LLAMA),
    "mistral": (transformers.MistralConfig(**COMMON), LLAMA),
    "qwen2": (transformers.Qwen2Config(**COMMON), QWEN2),
    "qwen3": (transformers.Qwen3Config(**COMMON, head_dim=4), QWEN3),
    "gemma": (transformers.GemmaConfig(**COMMON, head_dim=4), LLAMA),
    "phi": (transformers.PhiConfig(**COMMON), PHI),
    "phi3": (transformers.Phi3Config(**COMMON), PHI3),
    "gpt2": (
        transformers.GPT2Config(vocab_size=V, n_embd=H, n_layer=L, n_head=4, n_positions=32),
        GPT2,
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig(
            **COMMON, head_dim=4, num_experts=E_, num_experts_per_tok=2, moe_intermediate_size=M
        ),
        QWEN3_MOE,
    ),
    "mixtral": (transformers.MixtralConfig(**COMMON, num_local_experts=E_), MIXTRAL),
    "gpt_oss": (
        transformers.GptOssConfig(**COMMON, head_dim=4, num_local_experts=E_, num_experts_per_tok=2),
        GPT_OSS,
    ),
    "llama4": (
        transformers.Llama4TextConfig(
            **COMMON, head_dim=4, num_local_experts=E_, intermediate_size_mlp=INTER, interleave_moe_layer_step=2
        ),
        LLAMA4,
    ),
    "granite_moe": (
        transformers.GraniteMoeConfig(**COMMON, num_local_experts=E_, num_experts_per_tok=2),
        GRANITE_MOE,
    ),
}


def build(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CASES[name][0])


def expected(table, name):
    ends = [end for end in table if name.endswith(end)]
    assert ends, f"no expectation is stated for {name}"
    return table[max(ends, key=len)]


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_the_stated_view(name):
    model = build(name)
    layout = UnitLayout(model.named_parameters(), module=model)
    seen = set()
    for parameter, tensor in model.named_parameters():
        view = layout.views[parameter]
        kind, units, width, neuron = expected(CASES[name][1], parameter)
        found = (view.kind, view.units, view.width, view.neuron is not None)
        assert found == (kind, units, width, neuron), parameter
        shaped = view.view(tensor.detach())
        assert shaped.shape[-1] == width
        assert shaped.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        seen.add(parameter)
    assert seen == set(layout.views)


@pytest.mark.parametrize("name", CASES)
def test_a_guarded_step_runs(name):
    model = build(name)
    guard = Guard(model, GuardConfig(rank=4, sketch=8, residual=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    ids = torch.randint(1, V, (2, 6), generator=torch.Generator().manual_seed(0))
    for domain in ("math", "code", "code"):
        supervised_step(model, guard, optimizer, domain, ids)
    inside, outside, _ = guard.raw_parts()["math"]
    assert inside > 0
    assert outside > 0
    assert inside <= guard.domains["math"].radius.item() * 1.001


def test_tied_embeddings_are_one_parameter():
    config = transformers.Qwen3Config(**COMMON, head_dim=4, tie_word_embeddings=True)
    guard = Guard(transformers.AutoModelForCausalLM.from_config(config))
    assert "model.embed_tokens.weight" in guard.view.layout.views
    assert "lm_head.weight" not in guard.view.layout.views


def test_lora_factors_are_rows():
    model = get_peft_model(
        build("qwen3"),
        LoraConfig(r=3, target_modules=["q_proj", "o_proj", "down_proj"], modules_to_save=["lm_head"]),
    )
    views = Guard(model).view.layout.views
    assert {name.rpartition("layers.")[2].partition(".")[0] for name in views if "lora" in name} == {"0", "1"}
    for name, view in views.items():
        if "lora_A" in name:
            assert (view.kind, view.units, view.width) == ("row", 3, INTER if "down" in name else 16)
        elif "lora_B" in name:
            assert (view.kind, view.units, view.width) == ("row", 16, 3)
        else:
            assert name.endswith("lm_head.modules_to_save.default.weight")
            assert (view.kind, view.units, view.width) == ("row", V, H)
        assert view.neuron is None


def test_a_model_whose_evaluation_changes_its_weights_is_refused():
    sizes = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 7, "context_length": 32}
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes))
    with pytest.raises(UnsupportedError, match="from 6 on when it is evaluated.*rescale_every=0"):
        Guard(model)
    Guard(transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes, rescale_every=0)))
    Guard(transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes | {"num_hidden_layers": 6})))
