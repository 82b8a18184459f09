"""A LoRA adapter together with its base model, read as if the two were merged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from interference_guard.errors import CheckpointError

from .checkpoints import Checkpoint

PREFIX = "base_model.model."


class MergedCheckpoint:
    """W + scaling B A, computed for the rows that are asked for.

    Args:
        base: The model.
        adapter: Plain LoRA factors for it, with their `adapter_config.json`.

    Raises:
        CheckpointError: If the adapter is not plain LoRA, or does not fit the base.
    """

    def __init__(self, base: Checkpoint, adapter: Checkpoint) -> None:
        self.base, self.adapter = base, adapter
        self.scaling = _scaling(adapter.path)
        self._factors: dict[str, tuple[str, str]] = {}
        for name in adapter.shapes:
            if ".lora_A." not in name:
                continue
            target = name.removeprefix(PREFIX).replace(".lora_A.weight", ".weight")
            writer = name.replace(".lora_A.", ".lora_B.")
            if target not in base.shapes or writer not in adapter.shapes:
                raise CheckpointError(
                    f"{adapter.path} changes {target!r}, which {base.path} does not have. Give the base model "
                    "the adapter was trained on."
                )
            shape = (adapter.shapes[writer][0], adapter.shapes[name][-1])
            if shape != base.shapes[target]:
                raise CheckpointError(
                    f"{adapter.path} and {base.path} are of different architectures: {target!r} is {shape} in "
                    f"the adapter and {base.shapes[target]} in the base. Give the adapter's own base model."
                )
            self._factors[target] = (name, writer)

    @property
    def label(self) -> str:
        """What a message calls it."""
        return self.adapter.label

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The base's shapes."""
        return self.base.shapes

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Merged rows in fp32."""
        found = self.base.rows(name, first, last)
        if name in self._factors:
            reader, writer = self._factors[name]
            found += self.scaling * (self.adapter.rows(writer, first, last) @ self.adapter.rows(reader))
        return found


def _scaling(folder: Path) -> float:
    path = folder / "adapter_config.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        alpha, rank = float(table["lora_alpha"]), float(table["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. An adapter is merged with its adapter_config.json at hand."
        ) from error
    special = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out") if table.get(key)]
    if special:
        raise CheckpointError(
            f"{path} sets {special[0]}; only plain LoRA with one rank can be merged here. Merge it with "
            "merge_and_unload() and compare the merged model."
        )
    return alpha / (math.sqrt(rank) if table.get("use_rslora") else rank)
