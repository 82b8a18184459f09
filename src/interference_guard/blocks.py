"""Weights of one shape, stacked, so that many small matrices cost one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .units import UnitLayout, UnitView

# Above this many elements a matrix is a block of its own and is read where it lies, without a copy.
STACK_LIMIT = 1 << 18


@dataclass(frozen=True)
class Block:
    """Equal unit views, handled as one ``(matrices, units, width)`` batch.

    Args:
        views: The unit views, all of one ``(units, width)``; a single one may hold a stack of experts.
        matrices: Length of the batch.
        units: Units of one matrix of the batch.
        width: Length of a unit.
    """

    views: tuple[UnitView, ...]
    matrices: int
    units: int
    width: int

    @property
    def name(self) -> str:
        """A key for saved state: the first member's name."""
        return self.views[0].name

    @property
    def numel(self) -> int:
        """Elements of all members."""
        return self.matrices * self.units * self.width

    def targets(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The members' unit views; writing to them writes to `tensors`."""
        return [view.view(tensors[view.name]) for view in self.views]

    def gather(self, tensors: Mapping[str, Tensor | None], device: torch.device | None = None) -> Tensor:
        """Members as one ``(matrices, units, width)`` fp32 tensor; a single fp32 member is not copied.

        A missing tensor (a gradient that is None) reads as zero, on `device` where all are missing.
        """
        found = [
            None if (tensor := tensors[view.name]) is None else view.view(tensor).float() for view in self.views
        ]
        present = next((item for item in found if item is not None), None)
        if present is None:
            return torch.zeros(self.matrices, self.units, self.width, device=device)
        filled = [torch.zeros_like(present) if item is None else item for item in found]
        if len(filled) == 1:
            return filled[0] if filled[0].dim() == 3 else filled[0].unsqueeze(0)
        return torch.stack(filled)


def make_blocks(layout: UnitLayout, parameters: Mapping[str, Tensor]) -> list[Block]:
    """Group a layout's views: small ones of one shape, dtype and device together, each large one alone."""
    groups: dict[tuple[object, ...], list[UnitView]] = {}
    for name, view in layout.views.items():
        tensor = parameters[name]
        shape = tuple(view.view(tensor).shape)
        key: tuple[object, ...] = (*shape, tensor.dtype, tensor.device)
        if len(shape) == 3 or tensor.numel() > STACK_LIMIT:
            key = (*key, name)
        groups.setdefault(key, []).append(view)
    return [_block(views, parameters) for views in groups.values()]


def _block(views: Sequence[UnitView], parameters: Mapping[str, Tensor]) -> Block:
    shape = views[0].view(parameters[views[0].name]).shape
    if len(shape) == 3:
        return Block(tuple(views), shape[0], shape[1], shape[2])
    return Block(tuple(views), len(views), shape[0], shape[1])
