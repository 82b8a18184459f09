"""The wrapper over every optimizer, with all that trainers do to one."""

import copy

import pytest
import torch
from torch import nn

from interference_guard import (
    Guard,
    GuardConfig,
    GuardedOptimizer,
    HostError,
    UnsupportedError,
    attach,
)
from tests.contracts.subclass import clipped


def schedule_free(parameters, lr):
    reason = "schedule-free optimizers are an optional dependency"
    return pytest.importorskip("schedulefree", reason=reason).AdamWScheduleFree(parameters, lr=lr)


def adamw_8bit(parameters, lr):
    reason = "8-bit optimizers are an optional dependency"
    return pytest.importorskip("bitsandbytes", reason=reason).optim.AdamW8bit(parameters, lr=lr)


def muon(parameters, lr):
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=lr)


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "adamw_foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    "adamw_fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr),
    "muon": muon,
    "schedule_free": schedule_free,
    "adamw_8bit": adamw_8bit,
    "clipped": clipped,
}
# Its loops retain none.
pytestmark = pytest.mark.filterwarnings("ignore:No completions of domain")
CONFIG = GuardConfig(rank=4, sketch=8, residual=4)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 8, generator=generator), torch.randn(16, 8, generator=generator)


def run(net, optimizer, guard, domains, after=lambda: None, start=0):
    if hasattr(optimizer, "train") and callable(optimizer.train):
        optimizer.train()
    for step, domain in enumerate(domains, start):
        x, y = batch(step)
        with guard.domain(domain):
            (net(x) - y).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()
        after()


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_ends_inside_the_region(name):
    net = model()
    guard = Guard(net, CONFIG)
    optimizer = GuardedOptimizer(OPTIMIZERS[name](list(net.parameters()), 1e-2), guard)
    assert isinstance(optimizer, torch.optim.Optimizer)
    checked = []

    def inside():
        for domain in guard.protected:
            state = guard.domains[domain]
            if state.foreign_steps:
                # Judged on the weights as they are, not on what the guard believes.
                checked.append(guard.raw_parts([domain])[domain][0] / state.radius.item())

    run(net, optimizer, guard, ["a"] * 5, inside)
    for step in range(5, 25):
        run(net, optimizer, guard, ["b"], start=step)
        state = guard.domains["a"]
        checked.append(guard.raw_parts(["a"])["a"][0] / state.radius.item())
    assert len(checked) == 20
    assert max(checked) <= 1 + 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_protected_domain_nothing_changes(name):
    plain, watched = model(), model()
    bare = OPTIMIZERS[name](list(plain.parameters()), 1e-2)
    guard = Guard(watched, CONFIG)
    guarded = GuardedOptimizer(OPTIMIZERS[name](list(watched.parameters()), 1e-2), guard)
    off = Guard(plain, GuardConfig(enabled=False))
    run(plain, bare, off, ["a"] * 8)
    run(watched, guarded, guard, ["a"] * 8)
    assert same(weights(plain), weights(watched))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_disabled_is_bit_identical_over_domains(name):
    plain, watched = model(), model()
    bare = OPTIMIZERS[name](list(plain.parameters()), 1e-2)
    off = Guard(watched, GuardConfig(enabled=False))
    guarded = GuardedOptimizer(OPTIMIZERS[name](list(watched.parameters()), 1e-2), off)
    run(plain, bare, off, ["a"] * 4 + ["b"] * 4)
    run(watched, guarded, off, ["a"] * 4 + ["b"] * 4)
    assert same(weights(plain), weights(watched))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_round_trip_goes_on_exactly(name):
    # The inner optimizer's state dict loads into a wrapped one, and the guard's state beside it.
    domains = ["a"] * 4 + ["b"] * 8
    whole = model()
    guard = Guard(whole, CONFIG)
    optimizer = GuardedOptimizer(OPTIMIZERS[name](list(whole.parameters()), 1e-2), guard)
    run(whole, optimizer, guard, domains[:7])
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    state = copy.deepcopy(guard.state_dict())
    run(whole, optimizer, guard, domains[7:], start=7)

    resumed = model()
    resumed.load_state_dict(saved[0])
    guard = Guard(resumed, CONFIG)
    guard.load_state_dict(state)
    optimizer = GuardedOptimizer(OPTIMIZERS[name](list(resumed.parameters()), 1e-2), guard)
    optimizer.load_state_dict(saved[1])
    run(resumed, optimizer, guard, domains[7:], start=7)
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
def test_accelerate_prepares_the_wrapper(name):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    plain, net = model(), model()
    guard = Guard(net, CONFIG)
    reference = GuardedOptimizer(OPTIMIZERS[name](list(plain.parameters()), 1e-2), Guard(plain, CONFIG))
    accelerator = Accelerator(cpu=True)
    try:
        optimizer = accelerator.prepare(GuardedOptimizer(OPTIMIZERS[name](list(net.parameters()), 1e-2), guard))
        run(plain, reference, reference.guard, ["a"] * 3 + ["b"] * 3)
        run(net, optimizer, guard, ["a"] * 3 + ["b"] * 3)
        assert guard.steps == 6
        assert same(weights(plain), weights(net))
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()


@pytest.mark.parametrize("scheduler", ["onecycle", "lambda", "plateau"])
def test_schedulers_drive_the_inner_rate(scheduler):
    net = model()
    guard = Guard(net, CONFIG)
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
    optimizer = GuardedOptimizer(inner, guard)
    made = {
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10),
        "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    }[scheduler]()
    rates = []

    def after():
        made.step(*([1.0] if scheduler == "plateau" else []))
        rates.append(inner.param_groups[0]["lr"])

    run(net, optimizer, guard, ["a"] * 4, after)
    assert len(set(rates)) > 1
    assert optimizer.param_groups is inner.param_groups


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "clipped"])
@pytest.mark.parametrize("keyword", [False, True])
def test_closures_are_observed_after_their_first_evaluation(name, keyword):
    plain, net = model(), model()
    reference = GuardedOptimizer(OPTIMIZERS[name](list(plain.parameters()), 1e-2), Guard(plain, CONFIG))
    guard = Guard(net, CONFIG)
    optimizer = GuardedOptimizer(OPTIMIZERS[name](list(net.parameters()), 1e-2), guard)
    losses = []
    for step, domain in enumerate(["a"] * 3 + ["b"] * 3):
        run(plain, reference, reference.guard, [domain], start=step)

        def closure(step=step):
            x, y = batch(step)
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            return loss

        with guard.domain(domain):
            losses.append(optimizer.step(closure=closure) if keyword else optimizer.step(closure))
    assert all(loss is not None for loss in losses)
    assert guard.domains["a"].curvature.count.item() == reference.guard.domains["a"].curvature.count.item()
    assert same(weights(plain), weights(net))


def test_add_param_group_reaches_the_inner_optimizer():
    net = model()
    guard = Guard(net, CONFIG)
    inner = torch.optim.AdamW(net[0].parameters(), lr=1e-2)
    optimizer = GuardedOptimizer(inner, guard)
    optimizer.add_param_group({"params": list(net[2].parameters()), "lr": 1e-3})
    assert [group["lr"] for group in inner.param_groups] == [1e-2, 1e-3]
    before = weights(net)
    run(net, optimizer, guard, ["a"] * 3 + ["b"] * 3)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_step_is_guarded():
    net, plain = model(), model()
    guard = Guard(net, CONFIG)
    optimizer = GuardedOptimizer(torch.optim.SGD(net.parameters(), lr=1e-2), guard)
    reference = GuardedOptimizer(torch.optim.SGD(plain.parameters(), lr=1e-2), Guard(plain, CONFIG))
    compiled = torch.compile(optimizer.step, backend="eager")
    for step, domain in enumerate(["a"] * 3 + ["b"] * 3):
        x, y = batch(step)
        with guard.domain(domain):
            (net(x) - y).square().mean().backward()
            compiled()
        optimizer.zero_grad()
        run(plain, reference, reference.guard, [domain], start=step)
    assert guard.steps == 6
    assert same(weights(plain), weights(net))


def test_hooks_run_once_and_detach_leaves_nothing():
    net = model()
    guard = Guard(net, CONFIG)
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
    optimizer = GuardedOptimizer(inner, guard)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    run(net, optimizer, guard, ["a"])
    assert calls == ["pre", "post"]
    assert optimizer.detach() is inner
    optimizer.detach()
    run(net, inner, guard, ["a"])
    assert guard.steps == 1
    assert len(inner._optimizer_step_pre_hooks) == len(inner._optimizer_step_post_hooks) == 1


def test_attach_works_as_a_context_and_on_wrappers():
    net = model()
    guard = Guard(net, CONFIG)
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)

    class Wrapper:
        optimizer = inner

    with attach(Wrapper(), guard) as hooks:
        assert hooks.attached
        run(net, inner, guard, ["a"])
    assert not hooks.attached
    run(net, inner, guard, ["a"])
    assert guard.steps == 1


def test_what_cannot_be_hooked_is_refused():
    net = model()
    guard = Guard(net, CONFIG)
    lbfgs = torch.optim.LBFGS(net.parameters())
    with pytest.raises(UnsupportedError, match="Use a first-order optimizer"):
        GuardedOptimizer(lbfgs, guard)
    assert not lbfgs._optimizer_step_pre_hooks
    with pytest.raises(UnsupportedError, match="not a torch.optim.Optimizer"):
        attach(object(), guard)
    stranger = torch.optim.AdamW(model().parameters())
    with pytest.raises(HostError, match="none of them is among the"):
        attach(stranger, guard)
    assert not stranger._optimizer_step_pre_hooks


class Lomo(torch.optim.SGD):
    """As the one of lomo-optim: hooks of the backward pass change the weights, and `step` does nothing."""

    def fused_backward(self, loss, lr):
        loss.backward()

    def step(self, closure=None):
        pass


class Layerwise(torch.optim.Optimizer):
    """As the one of transformers, which has an optimizer for each parameter and steps none itself."""

    def __init__(self, optimizer_dict):
        self.optimizer_dict = optimizer_dict
        super().__init__([torch.zeros(1)], {"lr": 1e-3})

    def step(self, closure=None):
        pass


def test_steps_within_the_backward_pass_are_refused():
    net = model()
    guard = Guard(net, CONFIG)
    lomo = Lomo(net.parameters(), lr=1e-3)
    layerwise = Layerwise({p: torch.optim.SGD([p], lr=1e-3) for p in net.parameters()})
    for inner, message in ((lomo, "Lomo changes .* leaves no gradients"), (layerwise, "without _layerwise")):
        with pytest.raises(UnsupportedError, match=message):
            attach(inner, guard)
        assert not inner._optimizer_step_pre_hooks


def test_a_guard_watches_an_optimizer_once():
    net = model()
    guard = Guard(net, CONFIG)
    optimizer = GuardedOptimizer(torch.optim.AdamW(net.parameters(), lr=1e-2), guard)
    for attempt in (attach, GuardedOptimizer):
        with pytest.raises(HostError, match="watches this AdamW already"):
            attempt(optimizer, guard)
    # Another guard may, and the same one once it has let go.
    attach(optimizer, Guard(net, CONFIG)).detach()
    attach(optimizer.detach(), guard)
    run(net, optimizer, guard, ["a"])
    assert guard.steps == 1


def halves(net):
    return ([p for p in net.parameters() if (p.dim() == 2) is want] for want in (True, False))


def test_two_optimizers_that_share_the_parameters_out_are_refused():
    net = model()
    guard = Guard(net, CONFIG)
    matrices, vectors = halves(net)
    first = torch.optim.Muon(matrices, lr=1e-3)
    hooks = attach(first, guard)
    other = torch.optim.AdamW(vectors, lr=1e-3)
    with pytest.raises(HostError, match=r"watches a Muon already.*Detach it .*call guard\.before_step\(\)"):
        attach(other, guard)
    assert not other._optimizer_step_pre_hooks
    hooks.detach()
    attach(other, guard)


def test_an_optimizer_that_nobody_holds_is_not_in_the_way():
    net = model()
    guard = Guard(net, CONFIG)
    matrices, vectors = halves(net)
    attach(torch.optim.SGD(matrices, lr=1e-3), guard)
    assert attach(torch.optim.SGD(vectors, lr=1e-3), guard).attached


def test_optimizers_that_take_turns_with_the_same_parameters_are_watched():
    net = model()
    guard = Guard(net, CONFIG)
    mine, theirs = (GuardedOptimizer(torch.optim.AdamW(net.parameters(), lr=1e-3), guard) for _ in range(2))
    run(net, mine, guard, ["a"])
    run(net, theirs, guard, ["b"], start=1)
    assert guard.steps == 2


def test_copies_are_refused():
    net = model()
    optimizer = GuardedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), Guard(net, CONFIG))
    with pytest.raises(UnsupportedError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
