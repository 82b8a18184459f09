"""Steps inside of steps: the hooks of a class and of its parent see one step of the host."""

import pytest
import torch

from interference_guard import Guard, GuardedOptimizer
from tests.contracts.subclass import clipped
from tests.contracts.test_optimizers import CONFIG, model, run, same, weights

pytestmark = pytest.mark.filterwarnings("ignore:No completions of domain")
DOMAINS = ["a"] * 4 + ["b"] * 4


def test_a_step_by_the_parents_step_is_one_step():
    net, plain = model(), model()
    guard, reference = Guard(net, CONFIG), Guard(plain, CONFIG)
    optimizer = GuardedOptimizer(clipped(net.parameters(), 1e-2), guard)
    parent = GuardedOptimizer(torch.optim.AdamW(plain.parameters(), lr=1e-2), reference)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    # Clips where the subclass does: after the guard has seen the gradients.
    parent.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0) and None)
    run(net, optimizer, guard, DOMAINS)
    run(plain, parent, reference, DOMAINS)
    assert len(fired) == 2 * len(DOMAINS)
    assert guard.steps == reference.steps == len(DOMAINS)
    assert guard.domains["a"].own_steps == reference.domains["a"].own_steps
    assert same(weights(plain), weights(net))


def test_a_step_that_raises_leaves_the_next_one_whole():
    net = model()
    guard = Guard(net, CONFIG)
    optimizer = GuardedOptimizer(clipped(net.parameters(), 1e-2), guard)
    run(net, optimizer, guard, DOMAINS)
    with guard.domain("b"):
        (net(torch.full((1, 8), torch.nan))).sum().backward()
        with pytest.raises(RuntimeError, match="non-finite"):
            optimizer.step()
    optimizer.zero_grad()
    run(net, optimizer, guard, ["b"] * 3)
    assert guard.steps == len(DOMAINS) + 3
