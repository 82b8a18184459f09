"""PEFT's ways of training a part of a model, and experts that a domain never reaches."""

import copy

import bitsandbytes
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from interference_guard import Guard, GuardConfig
from tests.trl.supervised import supervised_step
from tests.trl.test_architectures import COMMON, V, build

CONFIG = GuardConfig(rank=4, sketch=8, residual=4)
ids = torch.randint(1, V, (2, 6), generator=torch.Generator().manual_seed(0))


def steps(model, guard, domains, rate=0.05):
    """Supervised steps; every domain wants other labels for the same tokens."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for place, domain in enumerate(domains):
        labels = (ids * (3 if domain == "math" else 5) + place % 2) % V
        supervised_step(model, guard, optimizer, domain, ids, labels)


def inside(guard, domain="math"):
    return guard.raw_parts([domain])[domain].inside <= guard.domains[domain].radius.item() * 1.001


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["every target", "rslora", "modules to save"],
)
def test_adapters_stay_in_bounds_and_merge(settings):
    base = build("qwen3")
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **settings)
    )
    guard = Guard(model, CONFIG)
    steps(model, guard, ["math"] * 4 + ["code"] * 8)
    assert inside(guard)
    for name, tensor in model.get_base_model().state_dict().items():
        if name.replace(".base_layer", "") in frozen and "lora" not in name:
            assert torch.equal(tensor, frozen[name.replace(".base_layer", "")]), name
    with torch.no_grad():
        before = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=1e-3, atol=1e-4)


def test_of_several_adapters_the_trained_one_alone_is_guarded():
    model = get_peft_model(build("qwen3"), LoraConfig(r=3, init_lora_weights=False), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False))
    model.set_adapter("second")
    guard = Guard(model, CONFIG)
    assert guard.view.layout.views
    assert all(".second." in name for name in guard.view.layout.views)
    first = {name: p.detach().clone() for name, p in model.named_parameters() if ".first." in name}
    second = {name: p.detach().clone() for name, p in model.named_parameters() if ".second." in name}
    steps(model, guard, ["math"] * 3 + ["code"] * 4)
    assert inside(guard)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in first.items())
    assert not all(torch.equal(now[name], tensor) for name, tensor in second.items())


def quantised():
    """A tiny model whose linear layers are packed into 4 bits, as a QLoRA run loads it."""
    model = build("qwen3")
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                packed = bitsandbytes.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=torch.float32,
                    quant_type="nf4",
                )
                packed.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4"
                )
                setattr(parent, name, packed.to("cpu"))
    return model


def test_adapters_over_a_packed_base():
    model = quantised()
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    packed = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.dtype == torch.uint8
    }
    assert packed, "the base must really be packed"
    guard = Guard(model, CONFIG)
    assert all("lora_" in name for name in guard.view.layout.views)
    steps(model, guard, ["math"] * 3 + ["code"] * 5)
    assert inside(guard)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in packed.items())


def test_experts_that_a_domain_never_reached_stay_free_for_others():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **COMMON, head_dim=4, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=8
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    guard = Guard(model, GuardConfig(rank=4, sketch=8, residual=4))
    name = next(name for name in guard.view.layout.views if name.endswith("0.mlp.experts.gate_up_proj"))
    stack = dict(model.named_parameters())[name]
    # One token alone goes through one expert.
    one = ids[:1, :1].expand(1, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(domain, tokens):
        def note():
            between.append((stack.grad.abs().sum((1, 2)) > 0, stack.detach().clone()))

        between = []
        supervised_step(model, guard, optimizer, domain, tokens, stepped=note)
        ((used, moved),) = between
        return used, (stack.detach() - moved).abs().sum((1, 2))

    seen = torch.stack([step("math", one)[0] for _ in range(3)]).any(0)
    assert 0 < seen.sum() < 4, "some experts must see no token"
    reached, held = False, False
    for _ in range(6):
        # The same rows again and again: the displacement goes one way.
        used, projected = step("code", ids)
        reached = reached or bool((used & ~seen).any())
        held = held or bool((projected[seen] > 0).any())
        # What carries nothing of the first domain is never held back.
        assert projected[~seen].max() == 0
    assert reached, "the second domain must use an expert that the first did not"
    assert held, "the first domain's expert must be held"
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert inside(guard)
