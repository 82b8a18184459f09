"""Which of accelerate's engines the guard can follow, and where they keep the model."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor

from interference_guard.errors import UnsupportedError
from interference_guard.zero import check_settings, is_engine


def check_engine(accelerator: Any) -> None:
    """Refuse engines that hide the weights from the optimizer's step hooks.

    Raises:
        UnsupportedError: Under FSDP version 1, Megatron-LM, and settings of DeepSpeed that keep the weights
            elsewhere.
    """
    name = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if name == "FSDP" and not accelerator.is_fsdp2:
        raise UnsupportedError(
            "FSDP version 1 packs the weights of a block into one flat parameter, in which units cannot be told "
            "apart. Set fsdp_config={'version': 2}."
        )
    if name == "DEEPSPEED":
        check_settings(accelerator.state.deepspeed_plugin.deepspeed_config)
    if name in ("MEGATRON_LM", "TP"):
        raise UnsupportedError(
            f"The accelerate engine {name} spreads single matrices over several mesh dimensions, which the guard "
            "does not follow. Train with FSDP2 (fsdp=True, fsdp_config={'version': 2}), DeepSpeed's ZeRO or DDP."
        )


def steps_in_backward(trainer: Any) -> bool:
    """Whether the optimizer steps within `accelerator.backward`, before the trainer's own events of the step."""
    return bool(getattr(trainer, "is_deepspeed_enabled", False))


def batch_size(trainer: Any) -> int:
    """Rows of a training batch of one process; `auto_find_batch_size` may have lowered what the settings say."""
    return int(getattr(trainer, "_train_batch_size", trainer.args.train_batch_size))


def guarded_model(trainer: Any) -> Any:
    """What the guard is built on: DeepSpeed's engine, which there is once training begins, or the model."""
    wrapped = getattr(trainer, "model_wrapped", None)
    return wrapped if is_engine(wrapped) else trainer.model


def reduce(values: Tensor, kind: str) -> Tensor:
    """A 1-d tensor's sum, or its largest values, over all ranks; see `ranks.Reduce`.

    It holds no accelerator, which would keep the optimizer of a trainer that is left.
    """
    # The model may still lie on the CPU, where some backends sum nothing.
    gathered: Tensor = gather(values.to(PartialState().device).unsqueeze(0))
    return (gathered.sum(0) if kind == "sum" else gathered.amax(0)).to(values.device)
