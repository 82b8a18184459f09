"""The tables of docs/cost.md follow from the formulas, and the formulas from what a guard really keeps."""

from pathlib import Path

import pytest
import torch
import transformers

from benchmarks import cost_model
from benchmarks.shapes import memory
from interference_guard import Completions, Guard, GuardConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs/cost.md").read_text()


@pytest.mark.parametrize("make", [cost_model.memory_table, cost_model.work_table, cost_model.message_table])
def test_the_page_shows_the_tables(make):
    assert make(GuardConfig()) in PAGE


def test_memory_is_what_a_guard_keeps():
    shapes = cost_model.Shapes("tiny", 32, 48, 2, 4, 2, 64, True, head=8)
    config = GuardConfig(rank=4, sketch=8, residual=3)
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=64,
            tie_word_embeddings=True,
        )
    )
    for name, parameter in model.named_parameters():
        # The formulas leave the norms out.
        parameter.requires_grad_("norm" not in name)
    guard = Guard(model, config)
    for seed, domain in enumerate(("math", "math", "code")):
        ids = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        guard.begin({domain: 1.0})
        guard.before_step()
        ones = torch.ones_like(ids)
        guard.retain(domain, Completions(ids, ones, ones, torch.linspace(0, 1, 4)))
        guard.after_step()
    found = memory(guard, "math")
    # Per matrix there are a few single numbers more, and an eigenvalue for each direction.
    small = 4 * shapes.count * (config.sketch + 3)
    assert 0 <= found["local_model"] - cost_model.local_model(shapes, config) <= small
    assert 0 <= found["running_sums"] - cost_model.running_sums(shapes, config) <= small
