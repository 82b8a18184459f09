"""The tables of docs/cost.md follow from the formulas, and the formulas from what a guard really keeps."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks import cost_model, shapes, tables
from interference_guard import Guard, GuardConfig
from interference_guard.packing import tensor_bytes
from tests.docs.preludes import SIZES
from tests.trl.host import model_and_words
from tests.trl.supervised import supervised_step

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/cost.md").read_text()


@pytest.mark.parametrize("make", [cost_model.memory_table, cost_model.work_table, cost_model.message_table])
def test_the_page_shows_the_tables(make):
    assert make(GuardConfig()) in PAGE


def test_the_page_shows_what_was_measured():
    found = json.loads((ROOT / "benchmarks/results/overhead_qwen3-4b.json").read_text())
    assert shapes.ratios(found["measured"]) == found["ratios"]
    assert shapes.rates(found["measured"]) == found["billions_a_second"]
    assert tables.markdown(shapes.HEAD, shapes.cells(found["ratios"])) in PAGE
    rates = {name: f"{value:.0f}" for name, value in found["billions_a_second"].items()}
    assert f"reads {rates['read']} GB a second and multiplies at {rates['forward_backward']} GFLOP" in PAGE
    assert f"the guard at {rates['observe']} (observe) and {rates['predict_and_project']}" in PAGE
    assert tables.markdown(shapes.MOVED_HEAD, shapes.moved_cells(found["ratios"])) in PAGE
    three = found["ratios"]["by_domains"][2]
    over = three["over_read"]
    alone = (found["ratios"]["products_of_observe_over_read"], three["products_over_read"])
    assert f"take {alone[0]:.1f} and {alone[1]:.1f} reads with three domains" in PAGE
    times = [f"{over['observe'] / alone[0]:.1f}", f"{over['predict_and_project'] / alone[1]:.1f}"]
    assert f"the guard takes {times[0]} and {times[1]} times as long" in PAGE
    acting = three["moved"]["predict_and_project"]
    assert f"two thirds of the rest of the {acting['reads']:.1f} reads" in PAGE
    assert f"surface {acting['waits']:.0f} times, in {acting['operations']:.0f} operations" in PAGE
    assert three["moved"]["inside"]["waits"] == 1
    assert f"takes {found['ratios']['probe_of_1024_tokens_over_forward_backward']:.0%} of that pass" in PAGE


@pytest.mark.parametrize("page", ["README.md", "docs/limits.md"])
def test_quoted_memory(page):
    small, large = (_share(name) for name in ("Qwen3-0.6B", "Qwen3-4B"))
    text = (ROOT / page).read_text()
    assert f"{large:.1%} of the fp32 weights with 4B parameters" in text
    assert re.search(rf"parameters(,| and) {small:.1%} with 0\.6B", text)
    assert f"| this guard, at 4B | {large:.3f} |" in PAGE


def _share(name):
    model = next(item for item in cost_model.MODELS if item.name == name)
    config = GuardConfig()
    kept = cost_model.local_model(model, config) + cost_model.directions(model, config)
    return kept / (cost_model.FP32 * (model.parameters + model.norms))


def test_a_protected_domain_takes_at_most_a_hundredth_of_a_model_of_four_billion_parameters():
    assert _share("Qwen3-4B") < 0.01


@pytest.mark.parametrize("experts", [0, 4])
def test_memory_is_what_a_guard_keeps(tmp_path, experts):
    model, words = model_and_words(tmp_path)
    tiny = cost_model.Shapes("tiny", 32, 64, 2, 2, 1, len(words), True, head=16, experts=experts)
    if experts:
        sizes = {**SIZES, "vocab_size": len(words), "moe_intermediate_size": SIZES["intermediate_size"]}
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes, num_experts=experts, num_experts_per_tok=2, tie_word_embeddings=True)
        )
    config = GuardConfig(rank=4, sketch=8, residual=3)
    guard = Guard(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for seed, domain in enumerate(("math", "math", "code")):
        ids = torch.randint(len(words), (4, 8), generator=torch.Generator().manual_seed(seed))
        supervised_step(model, guard, optimizer, domain, ids)
    found, training = shapes.memory(guard, "math"), shapes.memory(guard, "code")
    # Per matrix there are a few single numbers more, and an eigenvalue for each direction.
    small = 4 * (tiny.count + sum(count for _, count in tiny.vectors())) * (config.sketch + 3)
    assert 0 <= found["local_model"] - cost_model.local_model(tiny, config) <= small
    assert 0 <= found["curvature"] - cost_model.directions(tiny, config) <= small
    assert 0 <= training["curvature"] - cost_model.running_sums(tiny, config) <= small
    # And nothing else.
    assert 0 <= tensor_bytes(guard) - sum(found.values()) - sum(training.values()) <= small
