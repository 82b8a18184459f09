"""What the ranks of the tests under accelerate do. The patches make engines real on the CPU, for tests alone."""

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from interference_guard import GuardConfig
from interference_guard.integrations.trl import InterferenceGuardCallback
from tests.distributed.jobs import whole
from tests.trl.host import COMMON, rows

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


def supervised_run(how, folder, steps=25):
    """25 steps of 4 rows over all ranks, 5 of one domain and 20 guarded ones of another."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if how == "fsdp2":
        fsdp_on_cpu()
    data = rows(PHASES).map(lambda row: {"completion": " " + row["answer"]}, remove_columns="answer")
    options = dict(FSDP2) if how == "fsdp2" else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    settings = {
        "output_dir": str(folder / how),
        "train_sampling_strategy": "sequential",
        "max_steps": steps,
        "per_device_train_batch_size": 4 // ranks,
    }
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**(COMMON | settings | {"learning_rate": 3e-3} | options)),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    callback = InterferenceGuardCallback(trainer, CONFIG)
    trainer.add_callback(callback)
    trainer.train()
    state = callback.guard.domains["math"]
    kind = type(next(trainer.model.parameters())).__name__
    kept = [log["guard/update_kept"] for log in trainer.state.log_history if "guard/update_kept" in log]
    table = {
        "kept": min(kept),
        "kind": kind,
        "engine": str(trainer.accelerator.distributed_type),
        "weights": {name: whole(p) for name, p in trainer.model.named_parameters()},
        "radius": state.radius.item(),
        "foreign": state.foreign_steps,
        "subspace": state.subspace.item(),
        "loss": state.measurement.loss,
    }
    callback.detach()
    return table
