"""Calls that a compiled optimizer step leaves as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Call = TypeVar("Call", bound=Callable[..., Any])


def eager(call: Call) -> Call:
    """The call, kept out of a compiled step: it would only break the graph into pieces."""
    disable = cast(Callable[[Call], Call], torch.compiler.disable)
    return disable(call)
