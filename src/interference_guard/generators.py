"""The host's global random generators, which stand after the guard's work where they stood before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Set the global generators of the CPU and of a device back afterwards, whatever was drawn from them.

    >>> before = torch.get_rng_state()
    >>> with generators_kept(torch.device("cpu")):
    ...     drawn = torch.rand(3)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    # The CPU's is always among them, and some devices have none that can be asked.
    known = hasattr(getattr(torch, device.type, None), "get_rng_state")
    with torch.random.fork_rng([device] if known else [], device_type=device.type if known else "cpu"):
        yield
