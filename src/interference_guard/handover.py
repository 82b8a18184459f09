"""Whether the weights that a run goes on with are those that the run before ended with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from .model_view import ModelView


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
