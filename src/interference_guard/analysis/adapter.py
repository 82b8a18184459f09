"""An adapter's configuration, as far as merging needs it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interference_guard.errors import CheckpointError

# Ways to start that change the base weights: without those, the factors mean nothing.
MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings under which the merged weight is another one than W + scaling B A, and why.
SPECIAL = {
    "lora_bias": "its factors have biases",
    "use_qalora": "its factors meet pooled inputs",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes parameters that are no layers",
    "trainable_token_indices": "it trains single tokens",
    "alora_invocation_tokens": "it acts on some tokens alone",
}


@dataclass(frozen=True)
class AdapterConfig:
    """Rank and scaling by layer.

    Args:
        r: Rank of layers no pattern names.
        alpha: The same of alpha.
        ranks: Rank by pattern.
        alphas: Alpha by pattern.
        rooted: Whether the scaling divides by the root of the rank (rsLoRA).
        fan_in_fan_out: Whether the layers are stored (in, out).
    """

    r: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rooted: bool
    fan_in_fan_out: bool

    def rank(self, layer: str) -> int:
        """Rank of a layer's factors."""
        return int(_chosen(layer, self.ranks, self.r))

    def scaling(self, layer: str) -> float:
        """What B A is multiplied with."""
        rank = self.rank(layer)
        return _chosen(layer, self.alphas, self.alpha) / (math.sqrt(rank) if self.rooted else rank)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read `adapter_config.json` beside an adapter.

    Args:
        path: The adapter's folder, or its file.

    Raises:
        CheckpointError: If it is missing, damaged, or of an adapter that cannot be merged here.
    """
    file = (path if path.is_dir() else path.parent) / "adapter_config.json"
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        reason = _reason(table)
        found = AdapterConfig(
            int(table["r"]),
            float(table["lora_alpha"]),
            {str(key): int(value) for key, value in (table.get("rank_pattern") or {}).items()},
            {str(key): float(value) for key, value in (table.get("alpha_pattern") or {}).items()},
            bool(table.get("use_rslora")),
            bool(table.get("fan_in_fan_out")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {type(error).__name__}: {error}. An adapter is merged with its "
            "adapter_config.json at hand."
        ) from error
    if reason:
        raise CheckpointError(
            f"{file}: {reason}, so its factors alone do not give the merged weights. Merge it with "
            "merge_and_unload() and compare the merged model."
        )
    return found


def _reason(table: dict[str, Any]) -> str | None:
    kind = table.get("peft_type", "LORA")
    if kind != "LORA":
        return f"the adapter is of the kind {kind}"
    start = table.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MOVED):
        return f"init_lora_weights={start!r} has changed the base weights"
    return next((f"{name} is set and {why}" for name, why in SPECIAL.items() if table.get(name)), None)


def _chosen(layer: str, patterns: Mapping[str, float], default: float) -> float:
    # The first pattern that matches the end of the name counts, as in peft.
    found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), None)
    return default if found is None else patterns[found]
