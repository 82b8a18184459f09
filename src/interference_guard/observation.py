"""One step's gradients of a model spread over ranks, as its curvatures take them in.

Where units are cut, G Omega is a sum over ranks, and no sum kept on one rank could stand for it: G'(G Omega)
joins the pieces of the same step. So it is taken before the step, summed together with everything else the
step has to sum, and joined with the gradient after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .blocks import STACK_LIMIT, Blocks
from .errors import HostError
from .shards import Spread


class Observation:
    """Local products of one step's gradients; `shared` must be summed over ranks before the rest is read.

    Args:
        gradients: Per block the piece here. They are read once more after the step, so the gradients themselves
            are held until it is over, and no copy of them.
        omegas: Test matrix of each block, ``(width, sketch)``.
        spread: How the blocks lie on the ranks.
    """

    def __init__(self, gradients: Blocks, omegas: Sequence[Tensor], spread: Spread) -> None:
        self._gradients = gradients
        self._regions = spread.regions
        self.energies: list[Tensor] = []
        """Per block the energy of every unit here, ``(matrices, units)``."""
        self.products: list[Tensor] = []
        """Per block G Omega: of the units here, or of all units where they are cut and it is a sum over ranks."""
        self.widths: list[int] = []
        """Per block how much of a unit's width lies here."""
        for index, (omega, region) in enumerate(zip(omegas, spread.regions, strict=True)):
            across = region.across(omega)
            energy, product = _see(gradients[index], across)
            self.energies.append(energy)
            self.products.append(region.whole_units(product) if region.split else product)
            self.widths.append(across.shape[0])
        own = [
            energy.sum()
            for energy, region in zip(self.energies, spread.regions, strict=True)
            if region.owner or region.split
        ]
        zero = self.energies[0].new_zeros(())
        self.total = torch.stack([zero, *own]).sum()
        self._versions = gradients.versions

    @property
    def shared(self) -> list[Tensor]:
        """What must be summed over ranks, in place."""
        cut = [seen for seen, region in zip(self.products, self._regions, strict=True) if region.split]
        return [self.total, *cut]

    @property
    def counted(self) -> Tensor:
        """Whether the step's gradients are finite and not all zero, a 0-d bool tensor, the same on all ranks."""
        return self.total.isfinite() & (self.total > 0)

    def updates(self) -> Iterator[Tensor]:
        """Per block what the step adds to Y here, ``(matrices, width, sketch)`` fp32.

        Raises:
            HostError: If the optimizer changed the gradients during its step.
        """
        if self._gradients.versions != self._versions:
            raise HostError(
                "The optimizer changed the gradients in place during its step, and on sharded parameters the "
                "guard reads them once more after it. Use an optimizer that leaves parameter.grad as it is "
                "(all of torch.optim do, without fused=True)."
            )
        for index, (seen, region) in enumerate(zip(self.products, self._regions, strict=True)):
            yield self._gradients[index].mT @ (region.units(seen) if region.split else seen)


def unit_energy(gradient: Tensor) -> Tensor:
    """Squared length of every unit's gradient, ``(matrices, units)``, of a block ``(matrices, units, width)``."""
    # The squares of a large block are a second one, written and read again; a norm along memory reads it once.
    if gradient.numel() > STACK_LIMIT and gradient.stride(-1) == 1:
        energy: Tensor = torch.linalg.vector_norm(gradient, dim=-1).square()
        return energy
    return gradient.square().sum(-1)


def _see(gradient: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and G Omega of one block, which is let go on return."""
    return unit_energy(gradient), gradient @ omega
