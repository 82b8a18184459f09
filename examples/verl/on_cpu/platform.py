"""A CPU platform for veRL, registered through its own `PlatformRegistry`."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# veRL 0.9.1 patches a class of TRL that TRL 1.16 no longer has, wherever TRL can be imported.
sys.modules.setdefault("trl", None)  # type: ignore[arg-type]

from verl.plugin.platform.platform_base import PlatformBase  # noqa: E402
from verl.plugin.platform.platform_manager import PlatformRegistry  # noqa: E402

GIBIBYTE = 1 << 30


class _DeviceModule(types.ModuleType):
    """`torch.cpu` with the functions that veRL expects of `torch.<device>`."""

    ZEROS = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")
    IDLE = (
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
        "manual_seed",
        "manual_seed_all",
        "set_device",
    )

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        if name in self.ZEROS:
            return lambda *args, **kwargs: 0
        if name in self.IDLE:
            return lambda *args, **kwargs: None
        if name in ("get_rng_state", "set_rng_state"):
            return getattr(torch, name)
        if name == "get_device_name":
            return lambda *args, **kwargs: "CPU"
        if name == "mem_get_info":
            return lambda *args, **kwargs: (16 * GIBIBYTE, 16 * GIBIBYTE)
        raise AttributeError(name)


def _join_group() -> None:
    """Make the default group before veRL does: it would ask for two backends of the one device type."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not torch.distributed.is_initialized() and all(name in os.environ for name in wanted):
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
        )


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """The CPU as a device; each worker has one."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _DeviceModule("torch_cpu")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: Any) -> None:
        pass

    def synchronize(self, device_index: Any = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: Any) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        # The first question a worker asks before it makes its group.
        _join_group()
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        # Logical devices, counted by `ray_init.num_gpus`; resource pools know no other name.
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None
