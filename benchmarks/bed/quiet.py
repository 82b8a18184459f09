"""Options of every trainer here and in the tests: one process on the CPU that writes nothing by itself."""

from __future__ import annotations

from typing import Any

QUIET: dict[str, Any] = {
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}
