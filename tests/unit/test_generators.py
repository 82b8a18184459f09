"""Models and policies that draw random numbers leave the host's generators as they were."""

import pytest
import torch

from interference_guard import Guard, GuardedOptimizer
from interference_guard.renewing import renew
from tests.unit.helpers import CONFIG, Toy, rollout, train


class Noisy(Toy):
    def forward(self, input_ids, attention_mask=None):
        logits = super().forward(input_ids)
        return logits + 0 * torch.rand_like(logits)


@pytest.mark.parametrize("own", [True, False])
def test_what_is_drawn_while_rows_are_scored_is_taken_back(own):
    model = Noisy()
    policy = None if own else lambda rows: torch.rand(rows.input_ids.shape)
    guard = Guard(model, CONFIG, policy=policy)
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), guard)
    train(model, guard, optimizer, ["math"] * 3 + ["code"])
    rows = rollout(model, "qa")
    before = torch.get_rng_state()
    guard.measure("math")
    renew(guard, guard.domains["math"])
    guard.protect("qa", rows, passes=1)
    assert torch.equal(torch.get_rng_state(), before)
