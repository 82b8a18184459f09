"""Warnings at the line of the user's program that led to them.

Between that line and the cause lie frames of this package, of torch and of a trainer, as many as the way there
takes. Python shows a warning once for each line that it names: named at one of theirs, it says nothing about the
program, and a second program's is not shown.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

# Packages whose lines are not the user's. The last two are the standard library's, in between where functions
# and contexts are decorated.
BETWEEN = frozenset(
    (
        *("interference_guard", "torch"),
        *("accelerate", "deepspeed", "hydra", "lightning", "peft", "pytorch_lightning", "ray"),
        *("transformers", "trl", "verl"),
        *("contextlib", "functools"),
    )
)


def warn(message: str) -> None:
    """Warn at the innermost line outside of `BETWEEN`, or at the outermost line of all where there is none."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _module(frame).partition(".")[0] in BETWEEN:
        frame = frame.f_back
    # No number of levels: Python's own count leaves out some frames.
    warnings.warn_explicit(
        message,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        _module(frame),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _module(frame: FrameType) -> str:
    # Code that is executed with globals of its own may have no name.
    return str(frame.f_globals.get("__name__") or "<string>")
