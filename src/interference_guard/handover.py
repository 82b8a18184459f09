"""Whether the weights that a run goes on with are those that the run before ended with."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .files import DETAILS
from .model_view import ModelView

# Numbers of a parameter that its fingerprint is of, evenly spaced: any training changes nearly all of them.
SAMPLED = 1024


def lengths(view: ModelView) -> dict[str, Tensor] | None:
    """Norm of each trainable parameter, by which weights are known again; None of a sharded model."""
    if view.shards.sharded:
        return None
    tensors = [parameter.detach() for parameter in view.parameters.values()]
    return dict(zip(view.parameters, torch._foreach_norm(tensors), strict=True))


def compare(before: Mapping[str, Tensor] | None, view: ModelView) -> None:
    """Warn where the weights are others than before.

    Args:
        before: What `lengths` returned when the run before ended.
        view: The model of the run that begins.
    """
    after = lengths(view) if before else None
    if not before or after is None:
        return
    # A model in another number format is rounded anew.
    pairs = {name: (length, after[name]) for name, length in before.items() if name in after}
    other = [name for name, (a, b) in pairs.items() if a.dtype == b.dtype and a.item() != b.item()]
    if other:
        warnings.warn(
            f"The weights are not those the run before ended with: {len(other)} of {len(before)} parameters "
            f"differ, for instance {other[0]!r}. What the guard knows is of those before. Trainers given "
            "a model's name load it anew: give each of them the same model object.",
            stacklevel=5,
        )


def fingerprints(view: ModelView) -> dict[str, list[object]] | None:
    """Number format, size and checksum of each trainable parameter, the same to the bit on any machine.

    None of a sharded model, and under DeepSpeed, whose fp32 weights are not those that it saves.
    """
    if view.shards.sharded or view.zero is not None:
        return None
    tensors = {name: view.shards.local(name, parameter.detach()) for name, parameter in view.parameters.items()}
    # Before training an engine may have put the weights away.
    return {name: _fingerprint(tensor) for name, tensor in tensors.items() if tensor.device.type != "meta"}


def compare_saved(directory: Path, view: ModelView) -> None:
    """Warn where the weights are not those beside which a state was saved.

    Args:
        directory: Holds the state.
        view: The model that goes on from it.
    """
    path = directory / DETAILS
    saved = json.loads(path.read_text(encoding="utf-8")).get("weights") if path.is_file() else None
    now = fingerprints(view) if saved else None
    if not saved or now is None:
        return
    # A model in another number format is rounded anew.
    known = [name for name, found in now.items() if name in saved and saved[name][:2] == found[:2]]
    other = [name for name in known if saved[name] != now[name]]
    if other:
        warnings.warn(
            f"The weights are not those that the state in {directory} was saved beside: {len(other)} of "
            f"{len(known)} parameters differ, for instance {other[0]!r}. What the guard knows is of those. Load "
            "the model from the same checkpoint; a PEFT adapter by PeftModel.from_pretrained(base, checkpoint, "
            "is_trainable=True), and give the trainer no peft_config, which makes a new one.",
            stacklevel=4,
        )


def _fingerprint(weight: Tensor) -> list[object]:
    flat = weight.reshape(-1)
    chosen = flat[:: max(1, flat.numel() // SAMPLED)].contiguous().cpu()
    number = zlib.crc32(bytes(chosen.view(torch.uint8).tolist())) if chosen.numel() else 0
    return [str(weight.dtype), weight.numel(), number]
