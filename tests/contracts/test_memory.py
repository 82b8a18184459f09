"""What a guarded step takes on top of weights, gradients and the guard's own state: a few blocks, no copy."""

import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interference_guard import Guard, GuardConfig
from tests.distributed.ranks import run_ranks

LAYERS, NARROW, WIDE = 12, 256, 512
# Every matrix is a block of its own, 1 / (2 LAYERS) of the weights, and takes twice that in fp32. Three such ones
# may live at once: a block and its squares, or a correction with the random bits that it is rounded with and the
# result.
BLOCKS = 3 * 2 / (2 * LAYERS)
# The rest is for each unit and not for each weight. A rank has some of it for the units of all ranks.
UNITS = 0.1
# Few directions, so that there are few numbers for each unit.
CONFIG = GuardConfig(rank=2, sketch=4, residual=2, first_order=True)
# Smaller than in earnest, so that the model can be.
LIMIT = 1 << 12


class Fresh(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside of it and are still alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {item.untyped_storage()._cdata for item in tree_leaves((args, kwargs)) if type(item) in PLAIN}
        out = function(*args, **(kwargs or {}))
        for item in tree_leaves(out):
            if type(item) not in PLAIN:
                continue
            storage = item.untyped_storage()
            key = storage._cdata
            # Views and operations in place give back what they were given.
            if key not in given and key not in self.alive:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


PLAIN = (torch.Tensor, nn.Parameter)


class Layers(nn.Module):
    """Matrices of equal size; one of each pair reads from the stream, the other writes to it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up_proj": nn.Linear(NARROW, WIDE, bias=False),
                    "down_proj": nn.Linear(WIDE, NARROW, bias=False),
                }
            )
            for _ in range(LAYERS)
        )


def peaks(dtype, sharded=False):
    """Most fresh bytes at a time, in parts of the weights here, by call: in own steps and in foreign ones."""
    torch.manual_seed(0)
    model = Layers().to(dtype)
    if sharded:
        fully_shard(model)
    with mock.patch("interference_guard.blocks.STACK_LIMIT", LIMIT):
        guard = Guard(model, CONFIG)
    blocks = [block.numel for block in guard.view.blocks]
    assert blocks == [NARROW * WIDE] * (2 * LAYERS), "each matrix must be a block of its own"
    pieces = [p.to_local() if sharded else p for p in map(torch.Tensor.detach, model.parameters())]
    size = sum(piece.nbytes for piece in pieces)
    worst = {"before_step": 0.0, "after_step": 0.0, "raw_parts": 0.0}

    def watch(name):
        with Fresh() as fresh:
            getattr(guard, name)()
        worst[name] = max(worst[name], fresh.peak / size)

    generator = torch.Generator().manual_seed(1)
    for step, domain in enumerate(["math", "math", "code", "code", "code"]):
        for parameter in model.parameters():
            shape = parameter.to_local().shape if sharded else parameter.shape
            gradient = torch.randn(shape, generator=generator).mul_(1e-3).to(dtype)
            # A DTensor of the same placement, or a plain one.
            parameter.grad = torch.zeros_like(parameter).detach()
            (parameter.grad.to_local() if sharded else parameter.grad).copy_(gradient)
        with guard.domain(domain):
            watch("before_step")
            with torch.no_grad():
                for piece in pieces:
                    piece.add_(torch.randn(piece.shape, generator=generator).to(dtype), alpha=1e-3 * (step + 1))
            watch("after_step")
    watch("raw_parts")
    assert guard.metrics()["guard/update_kept"] < 0.99, "the projection must have acted"
    return worst


@pytest.mark.filterwarnings("ignore:No completions of domain")
@pytest.mark.parametrize(
    ("dtype", "reads"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]
)
def test_a_step_upcasts_one_block_at_a_time(dtype, reads, monkeypatch):
    if not reads:
        # The path of accelerators.
        monkeypatch.setattr("interference_guard.curvature.READS_BACK", ())
    found = peaks(dtype)
    assert max(found.values()) < BLOCKS + UNITS, found


@pytest.mark.filterwarnings("ignore:No completions of domain")
def test_coordinates_of_several_domains_are_held_four_times_at_most():
    """Displacements, their weights, what was taken, and one domain's in work; and never all blocks' products."""
    torch.manual_seed(0)
    model, domains, rank = Layers(), 6, 16
    with mock.patch("interference_guard.blocks.STACK_LIMIT", LIMIT):
        guard = Guard(model, GuardConfig(rank=rank, sketch=32, residual=2))
    generator = torch.Generator().manual_seed(1)
    peak = {}
    for step, domain in enumerate([*map(str, range(domains)), "new", "inside", "outside"]):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).mul_(1e-3)
        for state in guard.domains.values():
            if state.radius is not None:
                state.radius = torch.full_like(state.radius, 1e-9 if domain == "outside" else 1e9)
        with guard.domain("new" if step > domains else domain):
            guard.before_step()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3 * (step + 1))
            with Fresh() as fresh:
                guard.after_step()
        peak[domain] = fresh.peak
    assert guard.metrics()["guard/update_kept"] < 0.99, "the projection must have acted"
    numbers = 4 * domains * rank * sum(block.matrices * block.units for block in guard.view.blocks)
    room = 4 * 4 * NARROW * WIDE
    assert peak["inside"] < 2.1 * numbers + room
    assert peak["outside"] < 4 * numbers + room


@pytest.mark.distributed
def test_a_step_on_sharded_weights_upcasts_one_block_at_a_time(tmp_path):
    ranks = 2
    for found in run_ranks(ranks, peaks, torch.bfloat16, True, folder=tmp_path):
        assert max(found.values()) < BLOCKS + ranks * UNITS, found
