"""Whether saved weights are those that a domain was anchored at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checkpoints import Checkpoint
from .part import Read, displacement
from .state import DomainRecord


def off_anchor(
    record: DomainRecord, weights: Checkpoint, advance: Callable[[str], None] = lambda name: None
) -> tuple[float, float]:
    """Raw prediction of what weights cost a domain, and what of it is rounding alone.

    A guard that trained with fp32 weights has an anchor that a checkpoint in bf16 can only come near.

    Args:
        record: A domain with a local model.
        weights: The weights.
        advance: Called with each parameter's name when it is done.

    Returns:
        The raw prediction of their displacement from the anchor, and that of errors as large as rounding to their
        dtype makes.
    """
    names = record.state.names(weights)
    generator = torch.Generator().manual_seed(0)
    found, rounding = 0.0, 0.0
    for part in record.parts():
        name = names[part.view.name]
        found += _total(part.damage(part.see(displacement(name, weights), anchored=True)))
        dtype = weights.entries[name].dtype
        if dtype is not None and dtype.itemsize < 4:
            rounding += _total(part.damage(part.see(_errors(name, weights, dtype, generator))))
        advance(part.view.name)
    return found, rounding


def _errors(name: str, weights: Checkpoint, dtype: torch.dtype, generator: torch.Generator) -> Read:
    """Read errors in place of weights, evenly spread over a step of their dtype."""

    def read(first: int, last: int) -> Tensor:
        rows = weights.rows(name, first, last)
        return rows.mul_(torch.rand(rows.shape, generator=generator).sub_(0.5).mul_(torch.finfo(dtype).eps))

    return read


def _total(damage: tuple[Tensor, Tensor]) -> float:
    return sum(float(part.double().sum()) for part in damage)
