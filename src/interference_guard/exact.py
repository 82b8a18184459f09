"""Matrix products in full fp32, whatever the host has switched on for its own, and fp64 wherever the model lies.

Under autocast or TF32 the weights would be rounded before they meet the directions, and the displacement of a
step at a small learning rate lies below what is left of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Devices that have no fp64: Apple's GPUs.
SINGLE_ONLY = ("mps",)


def doubled(values: Tensor) -> Tensor:
    """The values in fp64, on the CPU where their device has none."""
    return (values.cpu() if values.device.type in SINGLE_ONLY else values).double()


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Turn autocast and reduced precision of fp32 products off; both are as before afterwards.

    Args:
        device: Where the guard computes.
    """
    before = [(switch, name, getattr(switch, name)) for switch, name in _switches(device)]
    # One that says nothing reads as the library's or the general one above it, and goes on following that.
    above = {getattr(part, "fp32_precision", None) for part in _above(device)} - {None, "none"}
    reduced = [item for item in before if item[2] not in _FULL]
    cast = torch.is_autocast_enabled(device.type)
    for switch, name, value in reduced:
        setattr(switch, name, False if isinstance(value, bool) else "ieee")
    try:
        with torch.autocast(device.type, enabled=False) if cast else nullcontext():
            yield
    finally:
        for switch, name, value in reduced:
            setattr(switch, name, "none" if value in above else value)


_FULL = (False, "none", "ieee")


def _above(device: torch.device) -> tuple[Any, ...]:
    """Where torch keeps what those say that say nothing: for a library as a whole, and for all."""
    return getattr(torch.backends, "cudnn" if device.type == "cuda" else "mkldnn", None), torch.backends


def _switches(device: torch.device) -> list[tuple[Any, str]]:
    """Where torch keeps the precision of fp32 products; since 2.9 by words, before by a flag."""
    library = getattr(torch.backends, "cuda" if device.type == "cuda" else "mkldnn", None)
    products = getattr(library, "matmul", None)
    # The flag is not even asked for where there are words: torch raises where they say what a flag cannot.
    name = next((name for name in ("fp32_precision", "allow_tf32") if hasattr(products, name)), None)
    return [] if name is None else [(products, name)]
