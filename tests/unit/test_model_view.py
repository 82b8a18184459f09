import pytest
import torch
from torch import nn

from interference_guard import GuardConfig, GuardedOptimizer, HostError, ShapeError, attach
from interference_guard.blocks import STACK_LIMIT
from interference_guard.local_block import Correction
from interference_guard.model_view import ModelView
from tests.unit.helpers import guarded, train


class Large(nn.Module):
    """A matrix that reads from the stream, one that writes to it, a stack of experts, and two small ones."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(64, STACK_LIMIT // 64 + 1, bias=False)
        self.down_proj = nn.Linear(STACK_LIMIT // 64 + 1, 64, bias=False)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(3, STACK_LIMIT // 64, 64))
        self.q_proj = nn.Linear(64, 64, bias=False)
        self.k_proj = nn.Linear(64, 64, bias=False)


def test_gradients_may_lie_in_another_layout_than_their_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2))
    view = ModelView(model, GuardConfig(rank=2, sketch=4))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    expected = [block.clone() for block in view.gradients()]
    # As `torch.autograd.grad` gives it where activations are channels-last.
    model[0].weight.grad = model[0].weight.grad.contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.grad.is_contiguous()
    assert all(map(torch.equal, view.gradients(), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_corrections_are_subtracted_where_the_weights_lie(dtype):
    torch.manual_seed(0)
    model = Large().to(dtype)
    view = ModelView(model, GuardConfig())
    assert max(block.numel for block in view.blocks) > STACK_LIMIT
    assert min(block.numel for block in view.blocks) < STACK_LIMIT
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    before = view.weights()
    before = [weights.clone() for weights in before]
    corrections = [
        Correction(torch.randn(b.matrices, b.units, 3), torch.randn(b.matrices, b.width, 3)) for b in view.blocks
    ]
    view.subtract(corrections, 0)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    for was, now, correction in zip(before, view.weights(), corrections, strict=True):
        torch.testing.assert_close(was - now, correction.dense(), **tolerance)
    assert places == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def replaced(model):
    """As a host does that reads weights by `load_state_dict(assign=True)`."""
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def test_parameters_that_were_replaced_are_told_before_an_anchor_is_set():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3)
    replaced(model)
    before = guard.domains["math"].own_steps
    train(model, guard, optimizer, ["math"])
    with pytest.raises(HostError, match=r"6 of the 6 parameters .* Call guard\.bind\(model\)"):
        train(model, guard, optimizer, ["code"])
    assert not guard.domains["math"].anchored
    assert guard.domains["math"].own_steps == before + 1
    assert guard.trained == ("math",)


def test_a_guard_that_is_bound_follows_the_parameters_there_are_now():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3 + ["code"] * 3)
    optimizer.detach()
    replaced(model)
    guard.bind(model)
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), guard)
    seen = guard.domains["code"].curvature.count.item()
    train(model, guard, optimizer, ["code", "qa"], start=6)
    assert guard.domains["code"].curvature.count.item() > seen
    assert guard.domains["code"].anchored
    state = guard.domains["math"]
    assert guard.raw_parts(["math"])["math"].inside <= state.radius.item() * (1 + 1e-3)


def test_one_replaced_layer_is_told_when_an_optimizer_is_attached():
    model, guard, optimizer = guarded()
    optimizer.detach()
    old, model.embed = model.embed, nn.Embedding(16, 16)
    other = torch.optim.AdamW(model.parameters(), lr=0.02)
    with pytest.raises(HostError, match=r"1 of the 6 parameters .*'embed\.weight'.* build the guard afterwards"):
        attach(other, guard)
    assert not other._optimizer_step_pre_hooks
    with pytest.raises(ShapeError, match=r"embed\.weight"):
        guard.bind(model)
    model.embed = old
    attach(torch.optim.AdamW(model.parameters(), lr=0.02), guard)


def test_wrappers_and_other_names_of_the_same_parameters_are_no_replacement():
    model, guard, optimizer = guarded()
    train(model, guard, optimizer, ["math"] * 3)
    # As adapters do, which put a layer into one of their own.
    model.mlp["up_proj"] = nn.Sequential(model.mlp["up_proj"])
    train(model, guard, optimizer, ["code"])
    assert guard.domains["math"].anchored
