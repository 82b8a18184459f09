"""veRL's FSDP2 engine on a CPU: registered under "cpu", with the two obstacles swapped out while it is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl as fsdp


@contextmanager
def _swapped(name: str, value: Any) -> Iterator[None]:
    before = getattr(fsdp, name)
    setattr(fsdp, name, value)
    try:
        yield
    finally:
        setattr(fsdp, name, before)


@EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cpu")
class CpuEngine(fsdp.FSDPEngineWithLMHead):  # type: ignore[misc]
    """The engine veRL registers for GPUs."""

    def _build_module(self) -> Any:
        # Weights on the meta device would be filled by a broadcast that gloo on CPU does not take part in.
        real = partial(fsdp.get_init_weight_context_manager)
        with _swapped(
            "get_init_weight_context_manager",
            lambda use_meta_tensor=True, mesh=None: real(use_meta_tensor=False, mesh=mesh),
        ):
            return super()._build_module()

    def _build_fsdp_module(self, module: Any) -> Any:
        # Pinned memory needs an accelerator.
        real = fsdp.CPUOffloadPolicy
        with _swapped("CPUOffloadPolicy", lambda pin_memory=True: real(pin_memory=False)):
            return super()._build_fsdp_module(module)
