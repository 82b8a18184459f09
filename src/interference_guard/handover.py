"""Whether the weights that a run goes on with are those that the guard knows."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import StateError
from .model_view import ModelView
from .stepping import follow
from .telling import warn

if TYPE_CHECKING:
    from .guard import Guard

# Numbers of a parameter that its checksum is of, evenly spaced: any training changes nearly all of them.
SAMPLED = 1024
# Part of its radius by which a domain's prediction may differ from the saved one: other numbers of ranks round
# sums otherwise, and weights in less than fp32 are rounded after the step that the saved one is of.
SAME, SAME_ROUNDED = 0.1, 1.0
TRAINERS = (
    "Trainers given a model's name load it anew, and a peft_config makes a new adapter: give each of them the "
    "same model object, or load it from the checkpoint that the state is of (an adapter by "
    "PeftModel.from_pretrained(base, checkpoint, is_trainable=True))."
)


def checksums(view: ModelView) -> dict[str, str] | None:
    """Number format, size and checksum of each trainable parameter, the same to the bit on any machine.

    None of a sharded model.
    """
    if view.shards.sharded:
        return None
    # DeepSpeed's parameters as it saves them, and not the fp32 weights behind them.
    return _checksums(view.parameters if view.zero is not None else view.pieces())


def piece_checksums(view: ModelView) -> dict[str, str] | None:
    """Checksums of this rank's shards; None for an unsharded model and under DeepSpeed."""
    return _checksums(view.pieces()) if view.shards.sharded and view.zero is None else None


def _checksums(weights: Mapping[str, Tensor]) -> dict[str, str]:
    if any(tensor.is_pinned() for tensor in weights.values()):
        # Engines that offload weights do not wait for the copy.
        torch.accelerator.synchronize()
    # Before training an engine may have put the weights away.
    return {name: _checksum(tensor.detach()) for name, tensor in weights.items() if tensor.device.type != "meta"}


def compare(before: Mapping[str, str] | None, view: ModelView, where: str, advice: str = TRAINERS) -> bool:
    """Warn where the weights are others than before.

    Args:
        before: What `checksums` returned; None where it is not known.
        view: The model of the run that begins.
        where: What has those weights, to follow "those".
        advice: What to do about it.

    Returns:
        Whether any could be compared.
    """
    after = checksums(view) if before else None
    if not before or after is None:
        return False
    known, other = _compared(before, after)
    if other:
        warn(
            f"The weights are not those {where}: {len(other)} of {known} parameters differ, for instance "
            f"{other[0]!r}. What the guard knows is of those before. {advice}"
        )
    return bool(known)


def check_resumed(details: Mapping[str, Any], view: ModelView, where: object, advice: str) -> None:
    """Check weights that were read from a checkpoint against what the state in it says of them.

    Args:
        details: Of a state that was saved by ranks that held the same parts.
        view: The model, with the weights of the checkpoint.
        where: The folder of the state.
        advice: What to do where they are others.

    Raises:
        StateError: If they are others than those it was saved beside.
    """
    for before, now in ((details.get("weights"), checksums), (details.get("pieces"), piece_checksums)):
        after = now(view) if before else None
        known, other = _compared(before or {}, after or {})
        if other:
            raise StateError(
                f"The guard's state in {where} was saved beside other weights than were read with it: "
                f"{len(other)} of {known} parameters differ, for instance {other[0]!r}. Either not all of them "
                f"were read, or one of the two is of another attempt at the same step. {advice}"
            )


def _compared(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[int, list[str]]:
    """How many parameters can be compared, and which of them differ."""
    pairs = [(name, before[name], found) for name, found in after.items() if name in before]
    # A model in another number format is rounded anew.
    known = [(name, a, b) for name, a, b in pairs if a.rpartition(" ")[0] == b.rpartition(" ")[0]]
    return len(known), [name for name, a, b in known if a != b]


def compare_regions(guard: Guard, where: str, advice: str) -> None:
    """Warn where a protected domain is predicted to lose something else than when its state was saved.

    For sharded models, of which there are no checksums: the prediction is the same on any number of ranks. Every
    rank must call it, right after the state was read. Where no domain is protected yet it says nothing.

    Args:
        guard: With a state just read.
        where: As for `compare`.
        advice: As for `compare`.
    """
    follow(guard)
    full = all(tensor.dtype == torch.float32 for tensor in guard.view.pieces().values())
    # All of them, so that all ranks sum the same.
    for name, raw in guard.raw_parts().items():
        state = guard.domains[name]
        # The latter is of its last step as a protected one.
        if state.radius is None or state.subspace is None or state.own_steps or state.mixed_steps:
            continue
        radius, before = state.radius.item(), state.subspace.item()
        if not 0 < radius < math.inf:
            continue
        if abs(raw.inside - before) > (SAME if full else SAME_ROUNDED) * max(radius, before):
            warn(
                f"The weights are not those {where}, or were rounded since: the predicted interference of domain "
                f"{name!r} is {raw.inside / radius:.3g} times its radius, and was {before / radius:.3g} times it "
                f"when the state was saved. Projections would pull the weights towards those. {advice}"
            )
            return


def _checksum(weight: Tensor) -> str:
    flat = weight.reshape(-1)
    chosen = flat[:: max(1, flat.numel() // SAMPLED)].contiguous().cpu()
    number = zlib.crc32(bytes(chosen.view(torch.uint8).tolist())) if chosen.numel() else 0
    return f"{weight.dtype} {weight.numel()} {number:08x}"
