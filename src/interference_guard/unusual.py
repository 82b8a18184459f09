"""Calls of `optimizer.step` that train nothing, or whose gradients are not yet what they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .shards import is_sharded


def trains_nothing(optimizer: Optimizer, guard: Any) -> bool:
    """Whether this step is none: `GradScaler` found an overflow, or torch only sets up the optimizer's state.

    A fused optimizer is called also on overflow and then leaves the weights alone; reading that waits for the
    device. `torch.distributed.checkpoint` calls a new optimizer with gradients of zero and rates of zero to make
    its state, before any domain is named.
    """
    found = getattr(optimizer, "found_inf", None)
    if found is not None and bool(found):
        return True
    if optimizer.state or getattr(guard, "active", None):
        return False
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    return bool(rates) and not any(map(float, rates)) and not any(bool(g.any()) for g in _gradients(optimizer))


@torch.no_grad()
def unscale(optimizer: Optimizer) -> None:
    """Divide gradients in place by the scale that `GradScaler` leaves to a fused optimizer, and tell it so.

    Scaled gradients of different steps do not add up, and a fused step would divide them in the same way.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if isinstance(scale, Tensor):
        for gradient in _gradients(optimizer):
            gradient.div_(scale.to(gradient.device))
        setattr(optimizer, "grad_scale", None)  # noqa: B010


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """The gradients there are, of sharded parameters the pieces here."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    return [gradient.to_local() if is_sharded(gradient) else gradient for gradient in found]
