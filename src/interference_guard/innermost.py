"""The torch optimizer inside wrappers of it, and refusals of those whose steps cannot be followed."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from .errors import UnsupportedError


def innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer that changes the weights, inside accelerate's and other wrappers.

    Raises:
        UnsupportedError: If there is none, it is one whose step evaluates the loss many times, or one that steps
            within the backward pass.
    """
    seen: list[int] = []
    found = optimizer
    while id(found) not in seen:
        seen.append(id(found))
        inner = getattr(found, "optimizer", None)
        if inner is None or inner is found:
            break
        found = inner
    if not isinstance(found, Optimizer) or not hasattr(found, "_optimizer_step_pre_hooks"):
        raise UnsupportedError(
            f"{type(found).__name__} is not a torch.optim.Optimizer with step hooks. Give attach() a torch "
            "optimizer, or a wrapper that has one as its .optimizer attribute."
        )
    if isinstance(found, torch.optim.LBFGS):
        raise UnsupportedError(
            "LBFGS evaluates the loss several times in one step, so there is no one gradient to observe. "
            "Use a first-order optimizer, for instance AdamW."
        )
    _check_steps(found)
    return found


def _check_steps(optimizer: Optimizer) -> None:
    """Refuse optimizers whose own `step` does nothing, because hooks of the backward pass have done it."""
    name = type(optimizer).__name__
    # LOMO and AdaLomo.
    if hasattr(optimizer, "fused_backward"):
        raise UnsupportedError(
            f"{name} changes the weights within the backward pass and leaves no gradients, so there is no step "
            "to observe or to correct. Use an optimizer that steps after it, for instance AdamW."
        )
    # What transformers puts in place of an optimizer for each parameter.
    if hasattr(optimizer, "optimizer_dict"):
        raise UnsupportedError(
            f"{name} stands for a layerwise optimizer, which changes the weights within the backward pass, so "
            "there is no step to observe or to correct. Use the same one without _layerwise in its name, for "
            "instance optim='galore_adamw'."
        )
