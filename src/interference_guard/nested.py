"""Steps of an optimizer inside of its own steps: of a class that calls ``super().step()`` torch hooks both."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

from torch.optim import Optimizer

from .eager import eager

HOOKED_IN = sys.modules[Optimizer.__module__].__file__


def outermost(optimizer: Optimizer, hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, called once for each step of the host, also where the optimizer's class steps by its parent's."""
    if sum("step" in vars(kind) for kind in type(optimizer).__mro__ if kind is not Optimizer) < 2:
        return hook

    # A compiled step has no frames to count.
    @eager
    def call(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return None if _nested(optimizer) else hook(optimizer, args, kwargs)

    return call


def _nested(optimizer: Optimizer) -> bool:
    """Whether two calls of torch's hooked step are on the stack."""
    # Not by a count of hooks: a step that raises never reaches its last ones.
    depth, frame = 0, sys._getframe(1)
    while frame is not None and depth < 2:
        if frame.f_code.co_filename == HOOKED_IN and frame.f_code.co_name == "wrapper":
            depth += frame.f_locals.get("self") is optimizer
        frame = cast(Any, frame.f_back)
    return depth == 2
