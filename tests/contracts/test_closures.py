"""Closures of `optimizer.step`, of optimizers too that evaluate them at weights which they put back."""

import pytest
import torch

from interference_guard import ConfigError, Guard, GuardConfig, GuardedOptimizer, MissingDomainError, attach
from tests.contracts.test_optimizers import batch, model, same, weights

pytestmark = pytest.mark.filterwarnings("ignore:No completions of domain")
CONFIG = GuardConfig(rank=4, sketch=8, residual=4)


class Sam(torch.optim.Optimizer):
    """Steps with the gradient at the weights a little uphill (sharpness-aware minimisation)."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)

    @torch.no_grad()
    def step(self, closure=None):
        moved = [(p, p.clone(), p.grad) for group in self.param_groups for p in group["params"]]
        for parameter, _, gradient in moved:
            parameter.add_(gradient, alpha=0.1)
        with torch.enable_grad():
            loss = closure()
        for parameter, before, _ in moved:
            parameter.copy_(before)
        self.base.step()
        return loss


def step(net, optimizer, guard, domain, number, fails=()):
    x, y = batch(number)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        if number in fails:
            raise RuntimeError("a lost worker")
        return loss

    with guard.domain(domain):
        if isinstance(optimizer.optimizer, Sam):
            (net(x) - y).square().mean().backward()
        return optimizer.step(closure)


def guarded(make, rate):
    net = model()
    guard = Guard(net, CONFIG)
    return net, guard, GuardedOptimizer(make(net.parameters(), lr=rate), guard)


def test_anchors_stand_at_the_weights_that_are_put_back():
    net, guard, optimizer = guarded(Sam, 0.0)
    for number, domain in enumerate("aab"):
        step(net, optimizer, guard, domain, number)
    # Nothing moves at rate 0, so a displacement could only be the optimizer's own detour.
    assert guard.raw("a") == 0.0
    assert guard.domains["b"].curvature.count.item() == 1


def test_the_gradient_of_the_first_evaluation_is_taken():
    net, guard, optimizer = guarded(Sam, 0.1)
    step(net, optimizer, guard, "a", 0)
    # The closure is evaluated once, and leaves the gradient it was stepped with.
    energy = sum(p.grad.double().square().sum() for p in net.parameters())
    seen = sum(sums.energy.double().sum() for sums in guard.domains["a"].curvature.sums)
    torch.testing.assert_close(seen, energy, rtol=1e-5, atol=0.0)


def test_a_closure_that_raises_leaves_the_step_to_be_tried_again():
    plain, watched = guarded(torch.optim.AdamW, 0.01), guarded(torch.optim.AdamW, 0.01)
    order = ["a"] * 3 + ["b"] * 3
    for number, domain in enumerate(order):
        step(plain[0], plain[2], plain[1], domain, number)
        net, guard, optimizer = watched
        if number in (1, 3):
            before = weights(net)
            with pytest.raises(RuntimeError, match="a lost worker"):
                step(net, optimizer, guard, domain, number, fails=(number,))
            assert same(before, weights(net))
            assert guard.steps == number
        step(net, optimizer, guard, domain, number)
    assert same(weights(plain[0]), weights(watched[0]))
    assert plain[1].raw("a") == watched[1].raw("a")


def test_a_step_without_a_domain_is_refused_before_the_closure_is_evaluated():
    _, _, optimizer = guarded(torch.optim.AdamW, 0.01)
    calls = []
    with pytest.raises(MissingDomainError, match="no domain is set"):
        optimizer.step(lambda: calls.append("closure"))
    assert not calls


def test_a_domain_that_is_named_inside_of_the_closure_is_refused():
    net, guard, optimizer = guarded(torch.optim.AdamW, 0.01)
    step(net, optimizer, guard, "a", 0)
    guard.begin({"a": 1.0})
    before = weights(net)

    def closure():
        guard.begin({"b": 1.0})
        net(batch(1)[0]).square().mean().backward()

    with pytest.raises(MissingDomainError, match=r"began as one of \['a'\], and its gradients are of \['b'\]"):
        optimizer.step(closure)
    assert same(before, weights(net))
    assert guard.steps == 1


def test_what_is_no_guard_is_refused():
    class Watcher:
        def before_step(self): ...

        def after_step(self): ...

    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    for wrap in (attach, GuardedOptimizer):
        with pytest.raises(ConfigError, match=r"given a guard of type Watcher\. Give it the Guard of"):
            wrap(optimizer, Watcher())
    assert not optimizer._optimizer_step_pre_hooks
