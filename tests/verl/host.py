"""veRL's real TrainingWorker and FSDP2 engine on a CPU, in this process or in several."""

import os
import socket

os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.verl import platform  # isort: skip

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.tensor import distribute_tensor
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine import EngineRegistry
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils import padding
from verl.workers.utils.losses import ppo_loss

import examples.verl.on_cpu.engine
from examples.verl import assets
from interference_guard.integrations.verl import register, settings

__all__ = ["examples", "platform"]

# All rows that three steps bring: each rank would choose among its own.
SMALL = {"rank": 4, "sketch": 8, "residual": 4, "retain": 48, "probe_steps": 2}
NAMES = ("products", "gcd")
VOCABULARY = 40
COMPLETIONS = 4


def join_group(rank=0, world=1, port=None):
    """The default process group; a second call in a process does nothing."""
    if dist.is_initialized():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] if port is None else port
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)


def write_model(folder):
    assets.write_model(folder, NAMES, seed=0, hidden=32, warm=0)
    return folder


def worker(model, guard=None, *, loaded=True, strategy="fsdp2", lora=0, micro=8, rate=1e-2, clip=1.0, **engine):
    """A worker whose engine is built and ready.

    Args:
        model: Folder of the model.
        guard: The `guard` node of the run's configuration.
        loaded: Whether the guard is loaded at all.
    """
    join_group()
    if loaded:
        register()
    torch.manual_seed(0)
    model_config = HFModelConfig(
        path=str(model),
        use_remove_padding=False,
        override_config={"attn_implementation": "eager"},
        enable_gradient_checkpointing=False,
        lora_rank=lora,
        external_lib="interference_guard.integrations.verl" if loaded else None,
    )
    tree = {"actor_rollout_ref": {"rollout": {"n": COMPLETIONS}}}
    settings.remember(OmegaConf.create(tree | ({} if guard is None else {"guard": guard})))
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=model_config,
        engine_config=FSDPEngineConfig(
            strategy=strategy,
            use_torch_compile=False,
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            use_dynamic_bsz=False,
            # veRL 0.7 looks for these by an index into what is a set since transformers 5.
            wrap_policy={"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
            micro_batch_size_per_gpu=micro,
            infer_micro_batch_size_per_gpu=micro,
            **engine,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=rate, clip_grad=clip, total_training_steps=100),
        checkpoint_config=CheckpointConfig(),
    )
    made = TrainingWorker(config)
    made.reset()
    actor = FSDPActorConfig(
        strategy=strategy, rollout_n=COMPLETIONS, ppo_micro_batch_size_per_gpu=micro, use_dynamic_bsz=False
    )
    made.set_loss_fn(lambda *args, **kwargs: ppo_loss(actor, *args, **kwargs))
    return made


def unpad_input(values, mask):
    """What veRL before 0.9 takes from flash-attn, which needs a GPU."""
    places, lengths = mask.flatten().nonzero().flatten(), mask.sum(1)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return values.flatten(0, 1)[places], places, starts, int(lengths.max())


if platform.VERSION < (0, 9):
    padding.unpad_input = unpad_input


def unguarded_engines():
    """Take the guard out of the registry, as in a process that never loaded it."""
    for table in EngineRegistry._engines["language_model"].values():
        for key, engine in table.items():
            if engine.__name__.startswith("Guarded"):
                table[key] = engine.__mro__[2]


def batch(seed, domains, *, rows=16, rank=0, world=1, mini=None, epochs=1, padded=None, **changes):
    """One update's rows as veRL's V1 trainer hands them to a rank; domains are given in turn to prompts.

    Args:
        padded: As its V0 trainer does, the only one that veRL 0.7 has.
    """
    draw = torch.Generator().manual_seed(seed)
    prompts, answers = [], []
    for _ in range(rows // COMPLETIONS):
        size = int(torch.randint(3, 6, (), generator=draw))
        prompts += [torch.randint(4, VOCABULARY, (size,), generator=draw)] * COMPLETIONS
    for _ in range(rows):
        size = int(torch.randint(2, 5, (), generator=draw))
        answers.append(torch.randint(4, VOCABULARY, (size,), generator=draw))
    rewards = torch.randint(0, 2, (rows,), generator=draw).float()
    advantages = torch.randn(rows, generator=draw)
    names = [domains[row // COMPLETIONS % len(domains)] for row in range(rows)]
    uids = [f"{seed}_{row // COMPLETIONS}" for row in range(rows)]
    mine = range(rank * rows // world, (rank + 1) * rows // world)

    def nested(make):
        return torch.nested.as_nested_tensor([make(row) for row in mine], layout=torch.jagged)

    ones = nested(lambda row: torch.ones(len(answers[row]), dtype=torch.long))
    data = tu.get_tensordict(
        {
            "prompts": nested(lambda row: prompts[row]),
            "responses": nested(lambda row: answers[row]),
            "input_ids": nested(lambda row: torch.cat([prompts[row], answers[row]])),
            "position_ids": nested(lambda row: torch.arange(len(prompts[row]) + len(answers[row]))),
            "response_mask": ones,
            "loss_mask": ones,
            "rm_scores": nested(
                lambda row: torch.nn.functional.pad(rewards[row].reshape(1), (len(answers[row]) - 1, 0))
            ),
            "old_log_probs": nested(lambda row: torch.full((len(answers[row]),), -4.0)),
            "advantages": nested(lambda row: torch.full((len(answers[row]),), float(advantages[row]))),
            "data_source": [names[row] for row in mine],
            "uid": [uids[row] for row in mine],
        }
        | {key: value for key, value in changes.items() if isinstance(value, list)}
    )
    if platform.VERSION < (0, 8) if padded is None else padded:
        data = padded_rows(data)
    whole = rows if mini is None else mini
    tu.assign_non_tensor(
        data,
        calculate_entropy=False,
        global_batch_size=whole,
        mini_batch_size=whole,
        epochs=epochs,
        seed=1,
        dataloader_kwargs={"shuffle": False},
        temperature=1.0,
        compute_loss=True,
    )
    return data


def padded_rows(data):
    """The same rows as the V0 trainer hands them over: prompts padded on the left, answers on the right."""

    def pad(name, left=False):
        rows = data[name].unbind()
        most = max(map(len, rows))
        sides = [(most - len(row), 0) if left else (0, most - len(row)) for row in rows]
        return torch.stack([torch.nn.functional.pad(row, side) for row, side in zip(rows, sides, strict=True)])

    prompts, answers = pad("prompts", left=True), pad("responses")
    # No token of these rows is 0.
    mask = (torch.cat([prompts, answers], 1) > 0).long()
    table = {
        "prompts": prompts,
        "responses": answers,
        "input_ids": torch.cat([prompts, answers], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "token_level_scores": pad("rm_scores"),
        **{name: pad(name) for name in ("response_mask", "old_log_probs", "advantages")},
        **{name: list(tu.get(data, name)) for name in ("data_source", "uid")},
    }
    return padding.left_right_2_no_padding(tu.get_tensordict(table))


def train(made, plan, start=0, **how):
    """One update for each entry of the plan, a domain or a tuple of them; returns the metrics of each."""
    found = []
    for step, names in enumerate(plan, start):
        names = (names,) if isinstance(names, str) else names
        output = made.train_mini_batch(batch(step, names, **how))
        found.append(tu.get(output, "metrics"))
    return found


def losses(metrics):
    """Loss and gradient norm of each optimizer step."""
    found = [(step["loss"], step["grad_norm"]) for step in metrics]
    return [pair for loss, norm in found for pair in zip(np.atleast_1d(loss), np.atleast_1d(norm), strict=True)]


def weights(made):
    return {
        name: (item.full_tensor() if hasattr(item, "full_tensor") else item).detach().clone()
        for name, item in made.engine.module.named_parameters()
    }


def put_weights(made, table):
    """Whole weights, as `weights` gives them, into a worker on any number of ranks."""
    with torch.no_grad():
        for name, parameter in made.engine.module.named_parameters():
            value = table[name]
            if hasattr(parameter, "device_mesh"):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)
