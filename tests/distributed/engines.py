"""What the ranks of the tests under accelerate do. The patches make engines real on the CPU, for tests alone."""

import dataclasses

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from interference_guard import GuardConfig
from interference_guard.integrations.trl import InterferenceGuardCallback, grpo
from interference_guard.trust_region import TrustRegion
from tests.distributed import zero_jobs
from tests.distributed.jobs import whole
from tests.trl import host
from tests.trl.host import COMMON, online, rows

CONFIG = GuardConfig(rank=4, sketch=8, residual=4, probe_steps=2, retain=16)
PHASES = [("math", 20), ("code", 80)]
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}}


def fsdp_on_cpu():
    """accelerate turns FSDP on the CPU into DDP without a word; this keeps it."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    before = AcceleratorState.__init__

    def after(self, *args, **kwargs):
        before(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = after


def accelerate_on_cpu():
    """accelerate takes DeepSpeed on the CPU for DDP too; this keeps it."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    before = AcceleratorState.__init__

    def after(self, *args, **kwargs):
        before(self, *args, **kwargs)
        plugin = kwargs.get("deepspeed_plugin")
        if plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
            plugin.set_mixed_precision(self._mixed_precision)
            # DeepSpeed casts the weights, and accelerate does not autocast on top.
            self._mixed_precision = "no"
            plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = plugin

    AcceleratorState.__init__ = after


def zero(stage, **changes):
    """A trainer's options for DeepSpeed."""
    accelerate_on_cpu()
    zero_jobs.deepspeed_on_cpu()
    table = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True} | changes
    settings = {"zero_optimization": table, "zero_allow_untested_optimizer": True}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {"deepspeed": settings | dict.fromkeys((*sizes, "gradient_clipping"), "auto")}


def weights_of(trainer):
    """The whole weights by name."""
    if trainer.is_deepspeed_enabled:
        return zero_jobs.weights_of(trainer.model_wrapped)[0]
    return {name: whole(p) for name, p in trainer.model.named_parameters()}


def supervised_run(how, folder, steps=25, blocks=PHASES, before=None):
    """25 steps of 4 rows over all ranks, 5 of one domain and 20 guarded ones of another; from `before` on."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if how == "fsdp2":
        fsdp_on_cpu()
    data = rows(blocks).map(lambda row: {"completion": " " + row["answer"]}, remove_columns="answer")
    options = dict(FSDP2) if how == "fsdp2" else {}
    if how.startswith("zero"):
        options = zero(int(how[-1]))
    settings = {
        "output_dir": str(folder / how),
        "train_sampling_strategy": "sequential",
        "max_steps": steps,
        "per_device_train_batch_size": 4 // ranks,
    }
    args = SFTConfig(**(COMMON | settings | {"learning_rate": 3e-3} | options))
    # After the settings: under ZeRO-3 the weights are shared out as they are read.
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    away = any(hasattr(parameter, "ds_tensor") for parameter in trainer.model.parameters())
    # Of sharded models regions move with the directions they have, of others with new ones.
    callback = InterferenceGuardCallback(trainer, dataclasses.replace(CONFIG, renew=False))
    if before is not None:
        callback.load(before)
    trainer.add_callback(callback)
    trainer.train()
    state = callback.guard.domains["math"]
    kind = type(next(trainer.model.parameters())).__name__
    kept = [log["guard/update_kept"] for log in trainer.state.log_history if "guard/update_kept" in log]
    table = {
        "kept": min(kept),
        "kind": kind,
        "away": away,
        "engine": str(trainer.accelerator.distributed_type),
        "weights": weights_of(trainer),
        "radius": state.radius.item(),
        "foreign": state.foreign_steps,
        "steps": callback.guard.steps,
        "subspace": state.subspace.item(),
        "loss": state.measurement.loss,
    }
    callback.save(folder / f"{how}_{steps}")
    callback.detach()
    return table


def streamed_run(folder):
    """A supervised stream that the first rank reads for both: the second domain reaches one rank a step early."""
    data = rows([("math", 6), ("code", 10)])
    data = data.map(lambda row: {"completion": " " + row["answer"]}, remove_columns="answer")
    host.known(folder / "model")
    trainer = host.supervised(folder, data.to_iterable_dataset(), max_steps=4)
    callback = InterferenceGuardCallback(trainer, CONFIG)
    trainer.add_callback(callback)
    seen = []
    begin = callback.guard.begin
    callback.guard.begin = lambda shares: (seen.append(dict(shares)), begin(shares))
    trainer.train()
    return seen


def script_run(arguments):
    """The script that trains a YAML file, on every rank."""
    return grpo.main(arguments).state.global_step


def load_on_cpu():
    """A resumed run of DDP on the CPU asks for a device "cpu:0", which torch.load does not know."""
    before = torch.load

    def load(file, map_location=None, **options):
        if isinstance(map_location, torch.device) and map_location.type == "cpu":
            map_location = "cpu"
        return before(file, map_location=map_location, **options)

    torch.load = load


def in_turn(calls):
    """Results of several trainers in one process, each with the state of accelerate and DeepSpeed to itself."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    found = []
    for call in calls:
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()
        found.append(call())
    return found


def rollouts_run(
    folder,
    name,
    stop=None,
    resume=False,
    stage=None,
    steps=12,
    iterations=1,
    bf16=False,
    moving=False,
    **config,
):
    """GRPO over all ranks: one prompt a rank and step, two domains, recovery if the settings say so."""
    load_on_cpu()
    if moving:
        # Whatever is lost, and wherever; the process ends with the run.
        TrustRegion.renewable = True
    # The parent wrote the model; two ranks that write it again would read each other's half of it.
    host.known(folder / "model")
    options = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "save_strategy": "steps",
        "save_steps": stop or 100,
        "learning_rate": 3e-3,
        "ddp_find_unused_parameters": False,
        "num_iterations": iterations,
        "bf16": bf16,
    }
    if stage is not None:
        options |= zero(stage)
    if stage == 3:
        # Two micro-batches make a step.
        options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "num_generations": 2}
    trainer = online("grpo", folder, rows([("math", 10), ("code", 20)]), **options)
    trainer.args.output_dir = str(folder / name)
    callback = InterferenceGuardCallback(trainer, dataclasses.replace(CONFIG, **config))
    trainer.add_callback(callback)
    taken = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            taken.append(callback.guard.trained)

    trainer.add_callback(Watch())
    trainer.add_callback(host.StopAt(stop))
    trainer.train(resume_from_checkpoint=True if resume else None)
    guard = callback.guard
    kept = [log["guard/update_kept"] for log in trainer.state.log_history if "guard/update_kept" in log]
    table = {
        "taken": taken,
        "protected": {name: state.foreign_steps for name, state in guard.domains.items() if state.anchored},
        "kept": min(kept, default=1.0),
        "engine": str(trainer.accelerator.distributed_type),
        "dtype": str(next(trainer.model.parameters()).dtype),
        "apart": zero_jobs.weights_of(trainer.model_wrapped)[1] if stage is not None else None,
        "weights": weights_of(trainer),
        "losses": {name: state.region.loss for name, state in guard.domains.items()},
        "radii": {name: state.radius.item() for name, state in guard.domains.items() if state.radius is not None},
        "schedule": guard.schedule.state(),
        "renewals": {name: state.renewals for name, state in guard.domains.items()},
        "retained": {name: len(s.retained) for name, s in guard.domains.items() if s.retained is not None},
    }
    callback.detach()
    return table
