"""Recognises calls of `optimizer.step` that train nothing, and gradients that are still scaled up."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from .shards import is_sharded


def trains_nothing(optimizer: Optimizer, named: bool) -> bool:
    """Whether this step is none: `GradScaler` found an overflow, or torch only sets up the optimizer's state.

    A fused optimizer is called also on overflow and then leaves the weights alone; reading that waits for the
    device. `torch.distributed.checkpoint` calls a new optimizer with gradients of zero and rates of zero to make
    its state, before any domain is named.

    Args:
        optimizer: Before its step.
        named: Whether the step's domains are known, or will be.
    """
    found = getattr(optimizer, "found_inf", None)
    if found is not None and bool(found):
        return True
    if optimizer.state or named:
        return False
    rates = [rate for group in optimizer.param_groups if (rate := group.get("lr")) is not None]
    return bool(rates) and not any(map(float, rates)) and not any(bool(g.any()) for g in _gradients(optimizer))


def scale_of(optimizer: Optimizer) -> Tensor | None:
    """What `GradScaler` left a fused optimizer to divide its gradients by, or None.

    Scaled gradients of different steps do not add up.
    """
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """The gradients there are, of sharded parameters the pieces here."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    return [gradient.to_local() if is_sharded(gradient) else gradient for gradient in found]
