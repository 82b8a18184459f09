"""What the ranks of the tests of sharded parameters do; in a module, so that processes can import it."""

import dataclasses
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interference_guard import Guard, GuardedOptimizer
from tests.unit.helpers import CONFIG, Toy, pass_rate, policy_gradient, rollout, train

ORDER = ["math"] * 5 + ["code"] * 8 + ["qa"] * 12


def answer(attempt):
    """What a call raises, as text for the process that compares the ranks; empty where it raises nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attempt()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(model, how):
    """The model sharded as `how` says, in place."""
    if how == "whole":
        return model
    mesh = init_device_mesh("cpu", (world(),))
    if how == "fsdp2":
        fully_shard(model.mlp["down_proj"], mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if how == "ignored":
        # The rest of the model stays whole on every rank.
        fully_shard(model.mlp["up_proj"], mesh=mesh)
        fully_shard(model.mlp["down_proj"], mesh=mesh)
        return model
    if how == "hybrid":
        grid = init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=("copies", "pieces"))
        fully_shard(model.mlp["down_proj"], mesh=grid)
        return fully_shard(model, mesh=grid)
    raise ValueError(how)


def guarded(how, hidden=16, make=torch.optim.AdamW, rate=0.02, seed=0, **changes):
    model = shard(Toy(seed, hidden), how)
    guard = Guard(model, dataclasses.replace(CONFIG, **changes))
    return model, guard, GuardedOptimizer(make(model.parameters(), lr=rate), guard)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def outcome(model, guard):
    """What must agree: weights, metrics, protected sets, radii."""
    return {
        "weights": {name: whole(p) for name, p in model.named_parameters()},
        "metrics": {k: v for k, v in guard.metrics().items() if not k.endswith("seconds")},
        "sets": {name: dict(s.half_set.masks) for name, s in guard.domains.items() if s.half_set is not None},
        "counts": {name: s.curvature.count.item() for name, s in guard.domains.items()},
        "places": guard.places(),
        "slopes": {
            name: torch.cat([slope.flatten() for slope in s.slopes]).norm().item()
            for name, s in guard.domains.items()
            if s.slopes is not None
        },
        "foreign": {name: s.foreign_steps for name, s in guard.domains.items()},
    }


def run(how, order=ORDER, **options):
    model, guard, optimizer = guarded(how, **options)
    train(model, guard, optimizer, order)
    return outcome(model, guard)


def evaluated(how, bind):
    """A run that begins with an evaluation, after which `fully_shard` leaves whole parameters in place."""
    model = shard(Toy(), how)
    guard = Guard(model, CONFIG) if bind else None
    pass_rate(model, "math")
    if guard is None:
        guard = Guard(model, CONFIG)
    else:
        guard.bind(model)
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), guard)
    train(model, guard, optimizer, ORDER)
    return outcome(model, guard)


def torn(folder):
    """What each rank is told where the last one could not write its part of the second save."""
    model, guard, optimizer = guarded("fsdp2")
    train(model, guard, optimizer, ORDER[:3])
    guard.save(folder)
    train(model, guard, optimizer, ORDER[3:6], start=3)
    if dist.get_rank() < world() - 1:
        guard.save(folder)
    dist.barrier()
    *_, guard, _ = guarded("fsdp2")
    return answer(lambda: guard.load(folder))


def attempts(folder):
    """What each rank is told where the last one has its part of another attempt at the steps of the others."""
    for seed in (0, 3):
        model, guard, optimizer = guarded("fsdp2", seed=seed)
        train(model, guard, optimizer, ORDER[:3])
        if not seed or dist.get_rank() < world() - 1:
            guard.save(folder)
    dist.barrier()
    *_, guard, _ = guarded("fsdp2")
    return answer(lambda: guard.load(folder))


def moved(how, **options):
    """A run in which regions move, with the directions they have: one is too little for these domains."""
    model, guard, optimizer = guarded(how, rank=1, sketch=2, **options)
    # One process could make backward passes of its own.
    guard.differentiates = False
    train(model, guard, optimizer, ORDER)
    return outcome(model, guard)


def resumed(how, at, folder, **options):
    """A run cut at a step and gone on with from files, in a fresh model."""
    model, guard, optimizer = guarded(how, **options)
    train(model, guard, optimizer, ORDER[:at])
    guard.save(folder)
    if dist.is_initialized():
        dist.barrier()
    kept = [p.to_local().clone() for p in model.parameters()], optimizer.state_dict()
    model, guard, optimizer = guarded(how, seed=7, **options)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept[0], strict=True):
            parameter.to_local().copy_(value)
    optimizer.load_state_dict(kept[1])
    guard.load(folder)
    train(model, guard, optimizer, ORDER[at:], start=at)
    return outcome(model, guard)


def begun(how, at, folder, **options):
    """The first part of a run: the guard's state as each rank saves it, and what a host would save, whole."""
    model, guard, optimizer = guarded(how, **options)
    train(model, guard, optimizer, ORDER[:at])
    guard.save(folder)
    moments = [{key: whole(value) for key, value in state.items()} for state in optimizer.state.values()]
    host = {"weights": [whole(parameter) for parameter in model.parameters()], "moments": moments}
    if not dist.is_initialized() or not dist.get_rank():
        torch.save(host, Path(folder) / "host")
    if dist.is_initialized():
        dist.barrier()


def went_on(how, at, folder, **options):
    """The rest of a run that `begun` started on another number of ranks."""
    model, guard, optimizer = guarded(how, seed=7, **options)
    host = torch.load(Path(folder) / "host")

    def placed(value, parameter):
        if not isinstance(parameter, DTensor) or not value.dim():
            return value
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)

    with torch.no_grad():
        for parameter, value in zip(model.parameters(), host["weights"], strict=True):
            parameter.copy_(placed(value, parameter))
    # An optimizer without any keeps none.
    for parameter, moments in zip(model.parameters(), host["moments"], strict=False):
        optimizer.state[parameter] = {key: placed(value, parameter) for key, value in moments.items()}
    guard.load(folder)
    train(model, guard, optimizer, ORDER[at:], start=at)
    return outcome(model, guard)


class Collectives(TorchDispatchMode):
    """Counts what goes over the wire."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith(("c10d", "_c10d")):
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


def several(calls):
    """Results of several calls in one launch: starting processes is what takes the time."""
    return [call() for call in calls]


def collectives(order, metric):
    """Collectives of each step's guarded part, and how many domains were protected."""
    model, guard, optimizer = guarded("fsdp2", projection_metric=metric)
    inner, found = optimizer.detach(), []
    for step, domain in enumerate(order):
        rows = rollout(model, domain, seed=step)
        guard.retain(domain, rows)
        policy_gradient(model, rows).backward()
        guard.begin({domain: 1.0})
        with Collectives() as counter:
            guard.before_step()
            inner.step()
            guard.after_step()
        found.append((len(guard.protected), counter.found))
        inner.zero_grad()
    return found


def bad_gradients(kind):
    """One rank's piece of one gradient is spoilt, or one rank has only zeros; what every rank counted."""
    model, guard, optimizer = guarded("fsdp2")
    train(model, guard, optimizer, ["math"] * 2)
    policy_gradient(model, rollout(model, "math", seed=9)).backward()
    inner = optimizer.detach()
    guard.begin({"math": 1.0})
    for index, parameter in enumerate(model.parameters()):
        gradient = parameter.grad.to_local()
        if kind == "nan" and dist.get_rank() == 1 and index == 1:
            gradient[0, 0] = torch.nan
        if kind == "zero here" and dist.get_rank() == 1:
            gradient.zero_()
        if kind == "zero":
            gradient.zero_()
    guard.before_step()
    guard.after_step()
    inner.zero_grad()
    sums = guard.domains["math"].curvature
    finite = all(bool((s.sketch if s.sketch is not None else s.basis).isfinite().all()) for s in sums.sums)
    return sums.count.item(), finite


def idle_pair():
    """Largest difference of weights between an unguarded run and one whose guard has nothing to protect."""
    ends = []
    for watched in (False, True):
        model = shard(Toy(), "fsdp2")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        guard = Guard(model, CONFIG) if watched else None
        wrapped = GuardedOptimizer(optimizer, guard) if guard is not None else None
        for step in range(6):
            rows = rollout(model, "math", seed=step)
            if guard is not None:
                guard.begin({"math": 1.0})
            policy_gradient(model, rows).backward()
            (wrapped or optimizer).step()
            optimizer.zero_grad()
        ends.append([p.to_local().clone() for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def refusal(kind, folder):
    """The message with which the guard refuses."""
    mesh = init_device_mesh("cpu", (2,))
    if kind == "grid":
        grid = init_device_mesh("cpu", (1, 2))
        linear = torch.nn.Linear(4, 4, bias=False)
        linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight.data, grid, [Shard(0), Shard(1)]))
        attempt = lambda: Guard(linear)  # noqa: E731
    elif kind == "flat":
        linear = FullyShardedDataParallel(torch.nn.Linear(4, 4, bias=False), device_id=torch.device("cpu"))
        attempt = lambda: Guard(linear)  # noqa: E731
    elif kind == "reference":
        # One rank: every piece is whole, and still its engine takes the gradients.
        one = init_device_mesh("cpu", (2, 1), mesh_dim_names=("all", "one"))["one"]
        guard = Guard(fully_shard(Toy(), mesh=one), CONFIG)
        attempt = lambda: guard.protect("math", rollout(Toy(), "math"))  # noqa: E731
    elif kind == "in place":
        model, guard, optimizer = guarded("fsdp2")
        inner = optimizer.detach()
        policy_gradient(model, rollout(model, "math")).backward()
        guard.begin({"math": 1.0})
        guard.before_step()
        inner.step()
        for parameter in model.parameters():
            parameter.grad.to_local().mul_(2)
        attempt = guard.after_step
    elif kind == "other rank":
        model, guard, optimizer = guarded("fsdp2")
        train(model, guard, optimizer, ["math"] * 2)
        guard.save(folder)
        dist.barrier()
        if dist.get_rank() == 0:
            for suffix in ("json", "safetensors"):
                source = Path(folder) / f"interference_guard_rank1.{suffix}"
                source.rename(Path(folder) / f"interference_guard.{suffix}")
        dist.barrier()
        attempt = (lambda: guard.load(folder)) if dist.get_rank() == 0 else (lambda: None)
    elif kind == "groups":
        model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")) if world() == 4 else mesh
        for layer, name in zip(model, "ab", strict=True):
            placed = distribute_tensor(layer.weight.data, grid[name], [Shard(0)])
            layer.weight = torch.nn.Parameter(placed)
        attempt = lambda: Guard(model)  # noqa: E731
    return answer(attempt)


def taken_over(at, **options):
    """A run whose model is sharded after some steps, as a trainer does that was given a guard with a state."""
    model, guard, optimizer = guarded("whole", make=torch.optim.SGD, rate=0.5, **options)
    train(model, guard, optimizer, ORDER[:at])
    optimizer.detach()
    guard.bind(shard(model, "fsdp2"))
    optimizer = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), guard)
    train(model, guard, optimizer, ORDER[at:], start=at)
    return outcome(model, guard)
