"""Running sums over a domain's own training gradients, and their factorisation.

For a weight in unit view with gradient G, ``(units, width)``, and a fixed test matrix Omega,
``(width, sketch)``, one own step does

    Y <- g Y + G' (G Omega),   e <- g e + rowsum(G * G),   n <- g n + 1

with the decay g of a half-life in own steps. The sums are linear in G'G and in rowsum(G * G), so those
of two ranks, micro-batches or runs add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .blocks import Block
from .errors import ShapeError
from .exact import doubled
from .observation import Observation, unit_energy
from .shards import Spread

# Part of a matrix's energy after which further directions are left to the residual.
RANK_COVERAGE = 0.9999
# Devices where reading a flag costs nothing and saves masked arithmetic.
READS_BACK = ("cpu",)


def sketch_matrix(width: int, sketch: int, seed: int) -> Tensor:
    """Orthonormal Gaussian test matrix, ``(width, min(sketch, width))`` fp32, the same on every machine and rank.

    The columns of a Gaussian matrix are orthonormalised: the Nystrom approximation depends on their span
    alone, and the core matrix stays well conditioned.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + width)
    # A host may have set another default device, and the numbers must be those of every machine.
    gaussian = torch.randn(width, min(sketch, width), generator=generator, dtype=torch.float64, device="cpu")
    basis: Tensor = torch.linalg.qr(gaussian).Q
    return basis.float()


@dataclass
class BlockSums:
    """The running sums of one block.

    Args:
        sketch: Y, ``(matrices, width, sketch)`` fp32; None while `basis` and `eigenvalues` hold it instead.
        energy: e, ``(matrices, units)`` fp32.
        basis: Leading eigenvectors, ``(matrices, width, rank)`` fp32, best first, or None.
        eigenvalues: ``(matrices, rank)`` fp32 of the *sum*, descending, or None.
    """

    sketch: Tensor | None
    energy: Tensor
    basis: Tensor | None = None
    eigenvalues: Tensor | None = None


@dataclass
class DomainCurvature:
    """Curvature of one domain over all blocks, in running sums.

    Args:
        decay: What one own step leaves of the sums before it.
        omegas: Test matrix of each block, ``(width, sketch)``.
        sums: One `BlockSums` a block; empty before the first counted step.
        count: n, the decayed number of counted steps: a 0-d fp32 tensor on the device of the first block, and on
            the CPU before the first step.
        spread: How the blocks lie on several ranks, or None. The sums then hold what this rank adds to them:
            of the sketch its part of the units or of the width, of the energy its part of each unit.
    """

    decay: float
    omegas: Sequence[Tensor]
    sums: list[BlockSums] = field(default_factory=list)
    count: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float32, device="cpu"))
    spread: Spread | None = None

    def observe(self, gradients: Sequence[Tensor]) -> Tensor:
        """Add one own step.

        A step whose gradients are all zero, or hold a NaN or an infinity, changes nothing. On an
        accelerator the decision is taken on the device, so no host synchronisation happens.

        Args:
            gradients: One ``(matrices, units, width)`` fp32 tensor a block; not changed. They are read by index,
                one at a time.

        Returns:
            Their squared length, a 0-d tensor.

        Raises:
            ShapeError: If their number or shapes differ from the sums'.
        """
        if len(gradients) != len(self.omegas):
            raise ShapeError(
                f"The gradients have {len(gradients)} blocks, the test matrices {len(self.omegas)}. "
                "Observe the parameters the guard was made for."
            )
        reads = self.omegas[0].device.type in READS_BACK
        # Whether the step counts is known only when all blocks were seen. Where that is read back, blocks are
        # made twice; elsewhere what each would add waits for it, in the room of the sums.
        energies, updates = [], []
        for index, omega in enumerate(self.omegas):
            if reads:
                energies.append(unit_energy(gradients[index]))
            else:
                energy, update = _see(gradients[index], omega)
                energies.append(energy)
                updates.append(update)
        self._ready(energies, [omega.shape[0] for omega in self.omegas])
        total = torch.stack([energy.sum() for energy in energies]).sum()
        counted = total.isfinite() & (total > 0)
        if reads:
            if counted.item():
                for index, energy in enumerate(energies):
                    self._accumulate(index, gradients[index])
                    self.sums[index].energy.mul_(self.decay).add_(energy)
                self.count.mul_(self.decay).add_(1.0)
        else:
            self._take(counted, updates, energies)
        return total

    def add(self, seen: Observation) -> None:
        """Add one own step of a model spread over ranks, after its observation was summed over them."""
        self._ready(seen.energies, seen.widths)
        counted = seen.counted
        if counted.device.type in READS_BACK and not counted.item():
            return
        self._take(counted, seen.updates(), seen.energies)

    def _accumulate(self, index: int, gradient: Tensor) -> None:
        self._sketch(index).baddbmm_(gradient.mT, gradient @ self.omegas[index], beta=self.decay)

    def _take(self, counted: Tensor, updates: Iterable[Tensor], energies: Sequence[Tensor]) -> None:
        """Add a step, or nothing where it does not count, which is decided on the device."""
        keep = torch.where(counted, self.decay, 1.0)
        for index, (update, energy) in enumerate(zip(updates, energies, strict=True)):
            self._sketch(index).mul_(keep).add_(torch.where(counted, update, 0.0))
            self.sums[index].energy.mul_(keep).add_(torch.where(counted, energy, 0.0))
        self.count.mul_(keep).add_(counted)

    def match(self, other: DomainCurvature) -> None:
        """Scale the sums in place so that a step weighs what one of another's does, if that has any energy.

        Only their overall size changes, so own steps that follow meet sums of their own order.
        """
        own, theirs = self.mean_energy(), other.mean_energy()
        factor = torch.where((own > 0) & (theirs > 0), theirs / own, 1.0)
        for index, sums in enumerate(self.sums):
            self._sketch(index).mul_(factor)
            sums.energy.mul_(factor)

    def clear(self) -> None:
        """Forget all steps."""
        self.sums.clear()
        self.count = torch.zeros_like(self.count)

    def mean_energy(self) -> Tensor:
        """Energy of a step, the decayed mean of those so far; a 0-d tensor."""
        total = torch.stack([sums.energy.sum() for sums in self.sums]).sum()
        return total / self.count.clamp(min=1e-30)

    def begin_like(self, other: DomainCurvature) -> None:
        """Have sums of the same shapes, all zero."""
        self.sums = [
            BlockSums(sums.energy.new_zeros(len(sums.energy), *omega.shape), torch.zeros_like(sums.energy))
            for sums, omega in zip(other.sums, self.omegas, strict=True)
        ]
        self.count = torch.zeros_like(other.count)

    def energies(self) -> list[Tensor]:
        """The energy of every unit, ``(matrices, units)`` a block; over several ranks one sum, which all call."""
        own = [sums.energy for sums in self.sums]
        return own if self.spread is None else self.spread.whole_units(own)

    def energies_with(self, seen: Observation | None) -> list[Tensor]:
        """The energies as they are after this step; empty before the first counted one.

        Args:
            seen: Of a model spread over ranks, the step that `add` is about to take in. They are then what
                this rank adds to a sum over ranks, ``(matrices, units)`` each.
        """
        kept = [sums.energy for sums in self.sums]
        if self.spread is None or seen is None:
            return kept if self.spread is None else []
        # A step that is not finite is not counted, and must not spoil what other ranks add.
        fresh = [torch.where(seen.total.isfinite(), energy, 0.0) for energy in seen.energies]
        for new, old in zip(fresh, kept, strict=False):
            new.add_(old, alpha=self.decay)
        return [region.spread_units(energy) for region, energy in zip(self.spread.regions, fresh, strict=True)]

    def factor(self, energies: Sequence[Tensor], ranks: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Eigenvectors and eigenvalues of E[G'G] per block, and its trace.

        Afterwards the sums live in factored form, in less room than Y; `observe` turns what is kept of them back,
        up to fp32 rounding. Over several ranks the sums are added up first; all ranks call it.

        Args:
            energies: What `energies` returned.
            ranks: Most eigenvectors that are kept, by block. Of the rest only the trace stays.

        Returns:
            Per block: basis ``(matrices, width, rank)``, eigenvalues ``(matrices, rank)`` descending
            and never negative, trace ``(matrices,)``; fp32.
        """
        # All of them, none, or those that were left when an error ended the call before.
        waiting = {index: sketch for index, sums in enumerate(self.sums) if (sketch := sums.sketch) is not None}
        if self.spread is not None and waiting:
            waiting = dict(zip(waiting, self.spread.whole_across([*waiting.values()]), strict=True))
        for index, sketch in waiting.items():
            sums, rank = self.sums[index], ranks[index]
            basis, eigenvalues = nystrom(sketch, self.omegas[index])
            # Copies, so that the columns that are let go take no memory.
            sums.basis = basis[:, :, :rank].contiguous()
            sums.eigenvalues = eigenvalues[:, :rank].contiguous()
            sums.sketch = None
        factors = []
        scale = 1.0 / self.count.clamp(min=1e-30)
        for sums, energy in zip(self.sums, energies, strict=True):
            assert sums.basis is not None
            assert sums.eigenvalues is not None
            factors.append((sums.basis, sums.eigenvalues * scale, energy.sum(-1) * scale))
        return factors

    def _ready(self, energies: Sequence[Tensor], widths: Sequence[int]) -> None:
        """Have sums, of these widths here, that the energies of a step can be added to."""
        if not self.sums:
            self.sums = [
                BlockSums(energy.new_zeros(len(energy), width, omega.shape[1]), torch.zeros_like(energy))
                for energy, width, omega in zip(energies, widths, self.omegas, strict=True)
            ]
            self.count = self.count.to(energies[0].device)
        found = [tuple(energy.shape) for energy in energies]
        expected = [tuple(sums.energy.shape) for sums in self.sums]
        if found != expected:
            raise ShapeError(
                f"The gradients' blocks are (matrices, units) {found}, the sums' {expected}. "
                "Observe the parameters the guard was made for."
            )

    def _sketch(self, index: int) -> Tensor:
        sums, omega = self.sums[index], self.omegas[index]
        if sums.sketch is None:
            assert sums.basis is not None
            assert sums.eigenvalues is not None
            sketch = (sums.basis * sums.eigenvalues.unsqueeze(-2)) @ (sums.basis.mT @ omega)
            sums.sketch = sketch if self.spread is None else self.spread.own(index, sketch)
            sums.basis = sums.eigenvalues = None
        return sums.sketch


def _see(gradient: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """A block's energies and what it adds to Y; the block is let go on return."""
    return unit_energy(gradient), gradient.mT @ (gradient @ omega)


def nystrom(sketch: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Stable fixed-rank Nystrom approximation of positive semidefinite matrices A from Y = A Omega.

    Exact when the rank of A is at most the number of columns of Omega.

    Args:
        sketch: Y, ``(matrices, width, sketch)`` fp32.
        omega: Orthonormal test matrix, ``(width, sketch)`` fp32.

    Returns:
        Eigenvectors ``(matrices, width, sketch)`` and eigenvalues ``(matrices, sketch)``, descending, fp32.
        Directions without energy are zero columns with eigenvalue 0.

    Reference:
        Tropp, Yurtsever, Udell, Cevher, 2017, arXiv:1706.05736, algorithm 3. Its shift, which keeps a
        Cholesky factorisation from failing, is replaced by an eigendecomposition of the core that drops what
        lies under the noise of the sums: the same stability, and no bias in small eigenvalues.
    """
    Y, Omega = doubled(sketch), doubled(omega)
    # Sums of gradients can be as small as 1e-24: the arithmetic runs on matrices of norm 1.
    norm = torch.linalg.matrix_norm(Y, keepdim=True)
    Y = Y / norm.clamp(min=torch.finfo(torch.float64).tiny)
    core = Omega.mT @ Y
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    # fp32 sums carry errors of this size: a smaller eigenvalue of the core is noise, and its inverse root
    # would blow that up.
    noise = 2 * torch.finfo(torch.float32).eps
    roots = torch.where(values > noise, values.clamp(min=noise).rsqrt(), 0.0)
    U, S, _ = torch.linalg.svd(Y @ (vectors * roots.unsqueeze(-2)), full_matrices=False)
    eigenvalues = S.square()
    eigenvalues = torch.where(eigenvalues > noise, eigenvalues, 0.0)
    U = torch.where((eigenvalues > 0).unsqueeze(-2), U, 0.0)
    # A state that was saved and loaded is contiguous; another layout would round differently.
    basis, values = U.float().contiguous(), (eigenvalues * norm.squeeze(-1)).float()
    return basis.to(sketch.device), values.to(sketch.device)


def truncate(basis: Tensor, eigenvalues: Tensor, trace: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the leading directions and say how much energy each missed direction carries.

    Args:
        basis: ``(matrices, width, k)``.
        eigenvalues: ``(matrices, k)``, descending.
        trace: ``(matrices,)``.
        rank: Most directions kept; fewer where those cover all but 1e-4 of every matrix's trace.

    Returns:
        U ``(matrices, width, kept)``, a view of `basis`, its eigenvalues, and the mean eigenvalue rho
        ``(matrices,)`` of the remaining directions.
    """
    before = eigenvalues.cumsum(-1) - eigenvalues
    used = (eigenvalues > 0) & (before < RANK_COVERAGE * trace.unsqueeze(-1))
    k = max(1, min(rank, int(used.sum(-1).max())))
    kept = eigenvalues[:, :k]
    rest = (trace - kept.sum(-1)).clamp(min=0.0)
    return basis[:, :, :k], kept, rest / max(basis.shape[1] - k, 1)


def sketch_matrices(blocks: Sequence[Block], sketch: int, seed: int) -> list[Tensor]:
    """The test matrix of each block, one shared by all of a width."""
    cache = {width: sketch_matrix(width, sketch, seed) for width in {block.width for block in blocks}}
    return [cache[block.width] for block in blocks]
