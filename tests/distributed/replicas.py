"""What the ranks of the tests of replicas do, in a loop of one's own; importable by processes."""

import dataclasses
import faulthandler
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from interference_guard import Guard, GuardedOptimizer
from interference_guard.renewing import renew
from tests.distributed.jobs import ORDER, answer
from tests.unit.helpers import CONFIG, Toy, policy_gradient, rollout, train

# Ranks that wait for each other for good end with their stacks.
PATIENCE = 60


def reduce(values, kind):
    both = values.clone()
    dist.all_reduce(both, dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX)
    return both


def follow(order, kept, model, policy, guard, optimizer, average=lambda: None):
    """Train on rows of this rank's own; `kept` of them by rank are retained, and `average` makes one gradient."""
    rank = dist.get_rank()
    for step, domain in enumerate(order):
        rows = rollout(model, domain, seed=1000 + 2 * step + rank)
        with guard.domain(domain):
            if kept[rank]:
                guard.retain(domain, rows.rows(slice(0, kept[rank])))
            policy_gradient(policy, rows).backward()
            average()
            optimizer.step()
            optimizer.zero_grad()
            guard.probe()


def trained(order, kept, **changes):
    """A guarded run of DDP with a buffer, which its forward passes send to all ranks; `kept` are rows by rank."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    model = Toy()
    model.register_buffer("frequencies", torch.ones(3))
    replica = DistributedDataParallel(model)
    guard = Guard(replica, dataclasses.replace(CONFIG, **changes), reduce=reduce)
    optimizer = GuardedOptimizer(torch.optim.AdamW(replica.parameters(), lr=0.02), guard)
    follow(order, kept, model, replica, guard, optimizer)
    faulthandler.cancel_dump_traceback_later()
    return model, guard


def uneven(kept, changes):
    """What must be alike on all ranks, of a run in which each keeps another number of rows."""
    model, guard = trained(ORDER, kept, **changes)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    state = guard.domains["math"]
    return weights, state.renewals, state.region.loss, guard.differentiates


def kept_rows(guard):
    return guard.domains["math"].retained.input_ids.tolist()


def saved(how, folder):
    """Refusal in one folder, then the rows of every rank before saving into one each and after loading."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Toy()
    if how == "hybrid":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copies", "pieces")))
    guard = Guard(model, CONFIG, reduce=reduce)
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), guard)

    def own(rows):
        return rows.rows(slice(4 * rank, 4 * rank + 4))

    train(model, guard, optimizer, ORDER[:8], keep=own)
    message = answer(lambda: guard.save(folder))
    # Where it is said whose rows these are, each has seen to it.
    guard.save(Path(folder) / f"own{rank}", place=(rank, ranks))
    place = Path(folder) / str(rank)
    guard.save(place, folders=ranks, place=(rank, ranks))
    before = kept_rows(guard)
    dist.barrier()
    guard.load(place, place=(rank, ranks))
    return message, before, kept_rows(guard)


class Adapted(Toy):
    """A frozen base with adapters beside it."""

    def __init__(self, hidden=16):
        super().__init__(0, hidden)
        self.requires_grad_(False)
        self.down = torch.nn.Linear(hidden, 4, bias=False)
        self.up = torch.nn.Linear(4, hidden, bias=False)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        x = x + self.mlp["down_proj"](torch.tanh(self.mlp["up_proj"](x))) + self.up(self.down(x))
        return self.lm_head(self.norm(x))


def adapted(kept):
    """A run whose frozen weights alone are sharded: every forward pass gathers them."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    ranks = dist.get_world_size()
    model = Adapted()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)), ignored_params=set(adapters))
    guard = Guard(model, dataclasses.replace(CONFIG, rank=1, sketch=2), reduce=reduce)
    optimizer = GuardedOptimizer(torch.optim.AdamW(adapters, lr=0.02), guard)

    def average():
        for adapter in adapters:
            adapter.grad = reduce(adapter.grad, "sum") / ranks

    follow(ORDER, kept, model, model, guard, optimizer, average)
    state = guard.domains["math"]
    assert state.radius is not None
    radius = state.radius.item()
    renew(guard, state)
    faulthandler.cancel_dump_traceback_later()
    weights = torch.cat([adapter.detach().flatten() for adapter in adapters])
    return weights, radius, state.renewals, guard.view.gathered


def rounded(hidden):
    """bf16 weights of which ranks hold one matrix in parts: those that all hold whole, after projections."""
    model = Toy(0, hidden).to(torch.bfloat16)
    fully_shard(model.mlp["down_proj"], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    guard = Guard(model, CONFIG)
    optimizer = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), guard)
    train(model, guard, optimizer, ORDER)
    whole = [parameter for name, parameter in model.named_parameters() if "down_proj" not in name]
    return torch.cat([parameter.detach().flatten() for parameter in whole]), guard.places()["projected"]


def graded(rewards):
    """What each rank's domain is steered by, where ranks evaluate rows of their own; `rewards` are by rank."""
    _, guard = trained(ORDER[:8], (8, 8))
    guard.calibrate("math", rewards[dist.get_rank()])
    state = guard.domains["math"]
    return state.true_reward, state.radius.item(), state.region.scale
