"""A model in evaluation mode, for a while, and without what makes its ranks wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def bare(model: nn.Module) -> nn.Module:
    """The model inside of DDP, whose own forward pass sends buffers between ranks: the guard's passes may differ.

    >>> type(bare(nn.Linear(1, 1))).__name__
    'Linear'
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards every module has its own mode again.

    Only ``training`` is set: no module's `eval` or `train` is called.
    """
    # Layers may change their weights in there, as those of loralib, which merge their factors at `eval`.
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
