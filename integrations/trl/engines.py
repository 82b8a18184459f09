"""Which of accelerate's engines the guard can follow."""

from __future__ import annotations

from typing import Any

from interference_guard.errors import UnsupportedError


def check_engine(accelerator: Any) -> None:
    """Refuse engines that hide the weights from the optimizer's step hooks.

    Raises:
        UnsupportedError: Under DeepSpeed, FSDP version 1 or Megatron-LM.
    """
    name = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if name == "FSDP" and not accelerator.is_fsdp2:
        raise UnsupportedError(
            "FSDP version 1 packs the weights of a block into one flat parameter, in which units cannot be told "
            "apart. Set fsdp_config={'version': 2}."
        )
    if name == "DEEPSPEED":
        raise UnsupportedError(
            "DeepSpeed steps on flat partitions of the weights, which the guard does not follow yet. Train with "
            "FSDP2 (fsdp=True, fsdp_config={'version': 2}), which shards the same states, or with DDP."
        )
    if name in ("MEGATRON_LM", "TP"):
        raise UnsupportedError(
            f"The accelerate engine {name} spreads single matrices over several mesh dimensions, which the guard "
            "does not follow. Train with FSDP2 (fsdp=True, fsdp_config={'version': 2}) or DDP."
        )
