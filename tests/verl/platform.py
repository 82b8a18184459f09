"""The CPU as veRL's device: a platform from 0.9 on, what earlier releases fall back to before it."""

import importlib
import importlib.metadata
import sys

import torch

VERSION = tuple(int(part) for part in importlib.metadata.version("verl").split(".")[:2])

if VERSION >= (0, 9):
    importlib.import_module("examples.verl.on_cpu.platform")
else:
    # They take `torch.cpu` for a device without asking what it can do.
    sys.modules.setdefault("trl", None)
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(torch.cpu, name, lambda *args, **kwargs: 0)
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "manual_seed", "set_device"):
        setattr(torch.cpu, name, lambda *args, **kwargs: None)
