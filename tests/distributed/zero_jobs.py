"""What the ranks of the tests under DeepSpeed's own engine do; in a module, so that processes can import it."""

import contextlib
import dataclasses
import os

import torch
import torch.distributed as dist

from interference_guard import Guard, attach, blocks
from tests.distributed.jobs import ORDER, Collectives, answer, outcome
from tests.unit.helpers import CONFIG, Toy, policy_gradient, rollout

# Before DeepSpeed is imported: it would look for an accelerator, and for compilers of its own operators.
os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}


def deepspeed_on_cpu():
    """DeepSpeed over gloo, without the sums in shared memory that a compiler would have to make first."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def engine_of(model, stage, rate=0.02, make=torch.optim.AdamW, groups=False, zero=None, **config):
    """The model in a DeepSpeed engine of a ZeRO stage.

    `groups` parts matrices and vectors, as trainers do, or gives embedding and head groups of their own.
    """
    parameters = [list(model.parameters())]
    if groups == "embeddings":
        alone = [model.embed.weight, model.lm_head.weight]
        rest = [p for p in model.parameters() if all(p is not item for item in alone)]
        parameters = [alone[:1], alone[1:], rest]
    elif groups:
        parameters = [[p for p in parameters[0] if p.dim() > 1], [p for p in parameters[0] if p.dim() < 2]]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        **config,
    }
    optimizer = make([{"params": part} for part in parameters], lr=rate)
    return deepspeed_on_cpu().initialize(model=model, optimizer=optimizer, config=settings)[0]


def guarded(stage, hidden=16, seed=0, changes=None, **options):
    engine = engine_of(Toy(seed, hidden), stage, **options)
    guard = Guard(engine, dataclasses.replace(CONFIG, **(changes or {})))
    return engine, guard, attach(engine.optimizer, guard)


def train(engine, guard, domains, start=0, after=lambda step: None):
    """As `helpers.train`, with what DeepSpeed asks for in place of backward and step."""
    for step, domain in enumerate(domains, start):
        rows = rollout(engine, domain, seed=1000 + step)
        with guard.domain(domain):
            guard.retain(domain, rows)
            engine.backward(policy_gradient(engine, rows))
            engine.step()
            guard.probe()
        after(step)


def weights_of(engine):
    """The weights that the model computes with, whole, and how far they are from the fp32 ones, rounded alike."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    found, apart = {}, 0.0
    for name, parameter in engine.module.named_parameters():
        # DeepSpeed itself does not find them where gradients go to the ranks in turn.
        master = None if engine.zero_round_robin_gradients() else safe_get_full_fp32_param(parameter)
        gathers = engine.zero_optimization_stage() == 3
        with deepspeed.zero.GatheredParameters([parameter], enabled=gathers):
            found[name] = parameter.detach().clone()
        if master is not None:
            apart = max(apart, (found[name] - master.to(found[name].dtype)).abs().max().item())
    return found, apart


def result(engine, guard):
    found = outcome(engine, guard)
    found["weights"], found["apart"] = weights_of(engine)
    return found


def run(stage, order=ORDER, **options):
    engine, guard, _ = guarded(stage, **options)
    train(engine, guard, order)
    return result(engine, guard)


def followed(stage, **options):
    """As `run`, and after each step how far the weights are apart, and displacements in parts of their radius."""
    engine, guard, _ = guarded(stage, **options)
    step, apart, excess = guard.after_step, [], []

    def after_step():
        step()
        states = [guard.domains[name] for name in guard.protected]
        excess.extend((state.subspace / state.radius).item() for state in states)

    guard.after_step = after_step
    # At the first guarded step, and now and then.
    train(engine, guard, ORDER, after=lambda step: step % 5 or apart.append(weights_of(engine)[1]))
    return {**result(engine, guard), "apart": max(apart), "excess": excess}


def collectives(stage, order, **options):
    """Collectives of the guard's part of each step, and how many domains were protected."""
    engine, guard, _ = guarded(stage, **options)
    found, counter = [], Collectives()

    def counted(call):
        def wrapped():
            with counter:
                call()

        return wrapped

    for name in ("before_step", "take_gradients", "after_step"):
        setattr(guard, name, counted(getattr(guard, name)))
    for step, domain in enumerate(order):
        rows = rollout(engine, domain, seed=step)
        guard.retain(domain, rows)
        guard.begin({domain: 1.0})
        counter.found.clear()
        engine.backward(policy_gradient(engine, rows))
        engine.step()
        found.append((len(guard.protected), list(counter.found)))
    return found


def idle_pair(stage):
    """Whether a run whose guard has nothing to protect ends in the bits of an unguarded one."""
    ends = []
    for watched in (False, True):
        engine = engine_of(Toy(), stage, groups=True)
        guard = Guard(engine, CONFIG) if watched else None
        if guard is not None:
            attach(engine.optimizer, guard)
        for step in range(6):
            rows = rollout(engine, "math", seed=step)
            if guard is not None:
                guard.begin({"math": 1.0})
            engine.backward(policy_gradient(engine, rows))
            engine.step()
        ends.append(weights_of(engine)[0])
    return all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def resumed(stage, at, folder, **options):
    """A run cut at a step and gone on with from DeepSpeed's and the guard's files, in a fresh engine."""
    engine, guard, _ = guarded(stage, **options)
    train(engine, guard, ORDER[:at])
    engine.save_checkpoint(str(folder))
    guard.save(folder)
    dist.barrier()
    engine, guard, _ = guarded(stage, seed=7, **options)
    engine.load_checkpoint(str(folder))
    guard.load(folder)
    train(engine, guard, ORDER[at:], start=at)
    return result(engine, guard)


@contextlib.contextmanager
def unstacked():
    """Every matrix a block of its own.

    Stacked ones keep as many directions as the one that needs most. Ranks stack fewer than one process does, and
    what a direction less would have seen counts as residual.
    """
    before, blocks.STACK_LIMIT = blocks.STACK_LIMIT, 0
    try:
        yield
    finally:
        blocks.STACK_LIMIT = before


@unstacked()
def begun(stage, at, folder, **options):
    """The first part of a run; without moments in the optimizer, weights are all that a host must save."""
    engine, guard, _ = guarded(stage, **options)
    train(engine, guard, ORDER[:at])
    guard.save(folder)
    host = {"weights": list(weights_of(engine)[0].values()), "moments": []}
    if not dist.get_rank():
        torch.save(host, folder / "host")
    dist.barrier()


@unstacked()
def went_on(stage, at, folder, hidden=16, changes=None, **options):
    """The rest of a run that `begun` started on another number of ranks."""
    model = Toy(7, hidden)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), torch.load(folder / "host")["weights"], strict=True):
            parameter.copy_(value)
    engine = engine_of(model, stage, **options)
    guard = Guard(engine, dataclasses.replace(CONFIG, **(changes or {})))
    attach(engine.optimizer, guard)
    guard.load(folder)
    train(engine, guard, ORDER[at:], start=at)
    return result(engine, guard)


def skipped():
    """Own steps after one step with gradients, one that DeepSpeed leaves out, and another one."""
    engine, guard, _ = guarded(2, groups=True, bf16={"enabled": True, "check_grad_overflow": True})
    found = []
    for scale in (1.0, float("inf"), 1.0):
        rows = rollout(engine, "math", seed=3)
        guard.begin({"math": 1.0})
        engine.backward(policy_gradient(engine, rows) * scale)
        engine.step()
        found.append((guard.steps, guard.domains["math"].own_steps))
    return found


def refusal(kind):
    """The message with which the guard refuses."""
    if kind == "offload":
        engine = engine_of(
            Toy(), 2, zero={"offload_optimizer": {"device": "cpu"}}, zero_force_ds_cpu_optimizer=False
        )
        attempt = lambda: Guard(engine)  # noqa: E731
    elif kind == "offload by its former name":
        engine = engine_of(Toy(), 2, zero={"cpu_offload": True}, zero_force_ds_cpu_optimizer=False)
        attempt = lambda: Guard(engine)  # noqa: E731
    elif kind == "deepcompile":
        engine = engine_of(Toy(), 3, compile={"deepcompile": True})
        attempt = lambda: Guard(engine)  # noqa: E731
    elif kind == "stage 0":
        engine = engine_of(Toy(), 0)
        attempt = lambda: Guard(engine)  # noqa: E731
    elif kind == "muon":
        engine = engine_of(Toy(), 2)
        # As DeepSpeed marks them; its own Muon needs a compiler.
        engine.optimizer.optimizer.param_groups[0]["use_muon"] = True
        attempt = lambda: Guard(engine)  # noqa: E731
    elif kind == "module":
        engine = engine_of(Toy(), 2)
        attempt = lambda: attach(engine.optimizer, Guard(engine.module))  # noqa: E731
    elif kind == "before the engine":
        model = Toy()
        guard = Guard(model, CONFIG)
        engine = engine_of(model, 2)
        guard.begin({"math": 1.0})
        attempt = guard.before_step
    elif kind == "frozen late":
        engine = engine_of(Toy(), 2)
        engine.module.extra = torch.nn.Linear(2, 2)
        attempt = lambda: Guard(engine)  # noqa: E731
    elif kind == "in place":
        engine = engine_of(Toy(), 2, groups=True)
        # Before the guard's own hooks: as an optimizer that does so in its step.
        engine.optimizer.optimizer.register_step_post_hook(
            lambda optimizer, args, kwargs: optimizer.param_groups[0]["params"][0].grad.mul_(2)
        )
        guard = Guard(engine, CONFIG)
        attach(engine.optimizer, guard)
        guard.begin({"math": 1.0})
        engine.backward(policy_gradient(engine, rollout(engine, "math")))
        attempt = engine.step
    elif kind == "elsewhere":
        engine = engine_of(Toy(), 2)
        with torch.no_grad():
            engine.optimizer.single_partition_of_fp32_groups[0].add_(1)
        attempt = lambda: Guard(engine)  # noqa: E731
    return answer(attempt)


def saved_and_read(stage, folder):
    """Whether a guard in one process goes on from its own files with the same sums."""
    engine, guard, _ = guarded(stage)
    train(engine, guard, ["math"] * 2 + ["code"])
    guard.save(folder)
    engine, again, _ = guarded(stage)
    again.load(folder)
    pairs = zip(
        guard.domains["math"].curvature.energies(), again.domains["math"].curvature.energies(), strict=True
    )
    return again.steps == guard.steps and all(torch.equal(a, b) for a, b in pairs)
