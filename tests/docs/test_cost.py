"""The tables of docs/cost.md follow from the formulas, and the formulas from what a guard really keeps."""

from pathlib import Path

import pytest
import torch

from benchmarks import cost_model
from benchmarks.shapes import memory
from interference_guard import Guard, GuardConfig
from tests.trl.host import model_and_words
from tests.trl.supervised import supervised_step

PAGE = (Path(__file__).resolve().parents[2] / "docs/cost.md").read_text()


@pytest.mark.parametrize("make", [cost_model.memory_table, cost_model.work_table, cost_model.message_table])
def test_the_page_shows_the_tables(make):
    assert make(GuardConfig()) in PAGE


def test_memory_is_what_a_guard_keeps(tmp_path):
    model, words = model_and_words(tmp_path)
    shapes = cost_model.Shapes("tiny", 32, 64, 2, 2, 1, len(words), True, head=16)
    config = GuardConfig(rank=4, sketch=8, residual=3)
    for name, parameter in model.named_parameters():
        # The formulas leave the norms out.
        parameter.requires_grad_("norm" not in name)
    guard = Guard(model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for seed, domain in enumerate(("math", "math", "code")):
        ids = torch.randint(len(words), (4, 8), generator=torch.Generator().manual_seed(seed))
        supervised_step(model, guard, optimizer, domain, ids)
    found = memory(guard, "math")
    # Per matrix there are a few single numbers more, and an eigenvalue for each direction.
    small = 4 * shapes.count * (config.sketch + 3)
    assert 0 <= found["local_model"] - cost_model.local_model(shapes, config) <= small
    assert 0 <= found["running_sums"] - cost_model.running_sums(shapes, config) <= small
