"""A domain's quadratic model around its anchor: directions, weights, and where the anchor stands in them.

For a weight in unit view W, ``(units, width)``, the curvature of unit j is modelled as

    H_j = c e_j (U diag(lam) U' + rho (I - U U')),   c = 1 / (sum(e) h)

with U, lam the leading eigenpairs of E[G'G], e the units' gradient energy, rho the mean eigenvalue of the
missed directions, and h one number a domain, which makes the largest weight 1. The displacement is seen as
z = W U - z0 in the kept directions and as r = (W R - q0) - z (U' R) in random directions R orthogonal to
them. Only z0 and q0 are kept of the anchor, so a domain costs (rank + residual) / width of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .curvature import DomainCurvature, truncate
from .local_block import LocalBlock
from .projection import subspace_energy
from .shards import Spread


def runs(order: Sequence[int], shape: Callable[[int], object]) -> list[list[int]]:
    """Neighbours that can be handled as one.

    Args:
        order: Indices of blocks, those that lie side by side next to each other.
        shape: What must be alike of them; None of a block that stands alone.
    """
    found: list[list[int]] = []
    former = None
    for index in order:
        own = shape(index)
        if own is not None and own == former:
            found[-1].append(index)
        else:
            found.append([index])
        former = own
    return found


# Compared and hashed by identity: products of two models' directions are kept by the models.
@dataclass(eq=False)
class LocalModel:
    """One domain's local model over all blocks, made by `anchor_domain`.

    Args:
        blocks: By block.
        spread: How the blocks lie on several ranks, or None.
        noise: What `rounding` returns, kept from the first time it is asked for; a 0-d tensor.
    """

    blocks: list[LocalBlock]
    spread: Spread | None = None
    noise: Tensor | None = None

    def stand(self, weights: Sequence[Tensor], matrices: Sequence[Tensor]) -> None:
        """Put the anchor at the present weights, in place; over several ranks all call it.

        Args:
            weights: Per block ``(matrices, units, width)`` fp32; read by index, one at a time and once.
            matrices: R per block; see `residual.residual_matrices`.
        """
        for index, (block, R) in enumerate(zip(self.blocks, matrices, strict=True)):
            W = weights[index]
            block.z0 = block.take(W @ block.directions()).contiguous()
            block.q0 = block.take(W @ _across(R, index, self.spread)).contiguous()
            # Let go before the next block is made.
            del W
        self.settle()

    @cached_property
    def order(self) -> list[int]:
        """The blocks as their coordinates lie in `Displacement.flat`: those of one shape side by side.

        What is done to neighbours of one shape is one call, however many layers a model has. It is the same for
        all domains of a model.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, block in enumerate(self.blocks):
            groups.setdefault((block.energy.shape[1], block.width), []).append(index)
        return [index for group in groups.values() for index in group]

    @cached_property
    def _runs(self) -> list[list[int]]:
        def shape(index: int) -> tuple[int, ...] | None:
            block = self.blocks[index]
            return None if block.rows is not None else (block.energy.shape[1], block.width, block.rank)

        return runs(self.order, shape)

    def _weights(self, run: Sequence[int]) -> Tensor:
        """Weights w of neighbours of one shape, as in `Displacement.weights`."""
        blocks = [self.blocks[index] for index in run]
        if len(blocks) == 1:
            return blocks[0].weights().flatten()
        energy, scale, lam = (
            torch.cat(list(parts))
            for parts in zip(*((block.energy, block.scale, block.lam) for block in blocks), strict=True)
        )
        return ((energy * scale.unsqueeze(-1)).unsqueeze(-1) * lam.unsqueeze(1)).flatten()

    @cached_property
    def _starts(self) -> list[int]:
        """Where each block's coordinates begin in `Displacement.flat`, by block."""
        starts, start = [0] * len(self.blocks), 0
        for index in self.order:
            starts[index] = start
            start += self.blocks[index].count * self.blocks[index].rank
        return starts

    def displacement(self) -> Displacement:
        """Room for the coordinates of the present weights relative to the anchor; `see` fills it by block.

        Over several ranks `flat` is then what this one adds; it must be summed in place before anything else.
        """
        make = self.blocks[0].U.new_empty if self.spread is None else self.blocks[0].U.new_zeros
        flat = make(sum(block.count * block.rank for block in self.blocks))
        return Displacement(flat, self.views(flat), torch.cat([self._weights(run) for run in self._runs]))

    def part(self, flat: Tensor, run: Sequence[int]) -> Tensor:
        """Numbers of neighbours, 1-d and a view, out of a vector laid out like `Displacement.flat`."""
        last = self.blocks[run[-1]]
        return flat[self._starts[run[0]] : self._starts[run[-1]] + last.count * last.rank]

    def views(self, flat: Tensor) -> list[Tensor]:
        """A vector laid out like `Displacement.flat` by block, each part ``(rows, rank)`` and a view."""
        return [self.part(flat, [index]).view(-1, block.rank) for index, block in enumerate(self.blocks)]

    def see(self, index: int, seen: Tensor, out: Displacement) -> None:
        """Put one block's coordinates into a `displacement`.

        Args:
            index: Of the block.
            seen: Its W U, ``(matrices, units, rank)`` fp32.
            out: Changed in place.
        """
        block, view = self.blocks[index], out.views[index]
        if block.region is not None:
            block.put(block.take(seen) - block.z0, view)
        elif block.rows is None:
            torch.sub(seen, block.z0.view_as(seen), out=view.view(seen.shape))
        else:
            torch.sub(block.select(seen), block.z0, out=view)

    def keep_energy(self) -> None:
        """Hold the units' energies as they are now, where the curvature's own go on changing."""
        for block in self.blocks:
            block.energy = block.energy.clone()

    def rounding(self) -> Tensor:
        """What rounding of the coordinates alone adds to the subspace term, about; a 0-d tensor."""
        if self.noise is None:
            self.noise = self._rounding([block.z0 for block in self.blocks])
        return self.noise

    def settle(self) -> None:
        """Compute `rounding` of a model spread over ranks, at a new anchor; all ranks call it."""
        self.noise = None
        if self.spread is None:
            return
        full = [block.U.new_zeros(block.count, block.rank) for block in self.blocks]
        for block, out in zip(self.blocks, full, strict=True):
            block.put(block.z0, out)
        self.spread.add(full)
        self.noise = self._rounding(full)

    def lengths(self, flat: Tensor) -> Tensor:
        """Squared length of a change of the weights along the directions, by matrix; the same on all ranks.

        The directions are orthonormal, so the coefficients tell it and the weights need not be read again.

        Args:
            flat: Its coefficients, laid out like `Displacement.flat`.

        Returns:
            ``(matrices of all blocks,)`` fp32.
        """
        found: list[Tensor] = [flat] * len(self.blocks)
        for run in self._runs:
            first, counts = self.blocks[run[0]], [len(self.blocks[index].energy) for index in run]
            part = self.part(flat, run).view(-1, first.rank)
            whole = first.scatter(part) if first.rows is not None else part.view(sum(counts), -1, first.rank)
            norms = torch.linalg.vector_norm(whole, dim=(1, 2))
            for index, norm in zip(run, norms.split(counts), strict=True):
                found[index] = norm
        return torch.cat(found).square()

    def _rounding(self, anchors: Sequence[Tensor]) -> Tensor:
        eps = torch.finfo(torch.float32).eps
        parts = [
            torch.dot(block.weights().flatten(), z0.flatten().square())
            for block, z0 in zip(self.blocks, anchors, strict=True)
        ]
        return torch.stack(parts).sum() * (16 * eps**2)

    def through(self, passes: Sequence[Tensor]) -> list[Tensor]:
        """The displacement seen through R per block, ``(rows, residual)``; to be summed like `displacement`.

        Args:
            passes: Per block W R, ``(matrices, units, residual)`` fp32.
        """
        found = []
        for block, seen in zip(self.blocks, passes, strict=True):
            q = block.take(seen) - block.q0
            if block.region is not None:
                part, q = q, q.new_zeros(block.count, q.shape[-1])
                block.put(part, q)
            found.append(q)
        return found

    def residual(self, seen: Displacement, passes: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
        """The prediction's part outside the kept directions, a 0-d tensor.

        Args:
            seen: This domain's `displacement`.
            passes: What `through` returned, summed over ranks.
            matrices: R per block; see `residual.residual_matrices`.
        """
        parts = [
            block.residual(z, q, R)
            for block, z, q, R in zip(self.blocks, seen.views, passes, matrices, strict=True)
        ]
        return torch.stack(parts).sum()


@dataclass
class Displacement:
    """A displacement in one domain's coordinates.

    Args:
        flat: z of all blocks, ``(n,)`` fp32; changed in place by `project`.
        views: The same memory by block, each ``(rows, rank)``.
        weights: w, ``(n,)`` fp32.
        taken: What `project` took from `flat`, ``(n,)`` fp32; None where it took nothing.
    """

    flat: Tensor
    views: list[Tensor]
    weights: Tensor
    taken: Tensor | None = None

    def energy(self) -> Tensor:
        """Sum of w z^2 / 2, a 0-d tensor: the subspace term of the prediction."""
        return subspace_energy(self.flat, self.weights)


def displacements(weights: Sequence[Tensor], models: Sequence[LocalModel]) -> list[Displacement]:
    """Displacements of several domains, in one pass over the weights: ``W [U_a, U_b, ...]`` per block.

    Args:
        weights: Per block ``(matrices, units, width)`` fp32; read by index, one at a time.
        models: The domains' local models. Over several ranks every `flat` must still be summed.
    """
    found = [model.displacement() for model in models]
    for index in range(len(weights)):
        _see(models, index, weights[index], found)
    return found


def _see(models: Sequence[LocalModel], index: int, W: Tensor, found: Sequence[Displacement]) -> None:
    """Put one block along the directions of each domain into their displacements."""
    directions = [model.blocks[index].directions() for model in models]
    product = W @ (directions[0] if len(directions) == 1 else torch.cat(directions, -1))
    parts = torch.split(product, [U.shape[2] for U in directions], -1)
    for model, part, out in zip(models, parts, found, strict=True):
        model.see(index, part, out)


def predict(
    weights: Sequence[Tensor], models: Sequence[LocalModel], matrices: Sequence[Tensor]
) -> list[tuple[Displacement, Tensor, Tensor]]:
    """Displacements of several domains and their raw predictions.

    Args:
        weights: Per block ``(matrices, units, width)`` fp32; read by index, one at a time and once.
        models: The domains' local models.
        matrices: R per block; see `residual.residual_matrices`.

    Returns:
        Per domain its displacement, the part of the prediction inside the kept directions and the part
        outside, 0-d tensors. Over several ranks one sum is made, so all of them call it.
    """
    spread = models[0].spread
    seen, passes = [model.displacement() for model in models], []
    for index, R in enumerate(matrices):
        W = weights[index]
        passes.append(W @ _across(R, index, spread))
        _see(models, index, W, seen)
        # Let go before the next block is made.
        del W
    through = [model.through(passes) for model in models]
    if spread is not None:
        spread.add([item.flat for item in seen] + [q for part in through for q in part])
    return [
        (item, item.energy(), model.residual(item, part, matrices))
        for item, part, model in zip(seen, through, models, strict=True)
    ]


def see_through(weights: Sequence[Tensor], matrices: Sequence[Tensor], spread: Spread | None) -> list[Tensor]:
    """The weights seen through R per block, ``(matrices, units, residual)``; over several ranks a part of it."""
    return [weights[index] @ _across(R, index, spread) for index, R in enumerate(matrices)]


def _across(matrix: Tensor, index: int, spread: Spread | None) -> Tensor:
    """A ``(width, n)`` matrix as far as it meets a block's width on this rank."""
    return matrix if spread is None else spread.regions[index].across(matrix)


def anchor_domain(
    curvature: DomainCurvature,
    energies: Sequence[Tensor],
    weights: Sequence[Tensor],
    matrices: Sequence[Tensor],
    ranks: Sequence[int],
    rows: Sequence[Tensor | None],
    reuse: LocalModel | None = None,
) -> LocalModel:
    """Build a domain's local model with its anchor at the present weights; over several ranks all call it.

    Args:
        curvature: The domain's sums; they are factored in place unless `reuse` is given.
        energies: What ``curvature.energies()`` returned.
        weights: Per block ``(matrices, units, width)`` fp32; not changed and not kept, read by index, one at a
            time and once.
        matrices: R per block; see `residual.residual_matrices`.
        ranks: Most directions a matrix, by block.
        rows: Protected units per block, or None for all of them.
        reuse: An earlier local model whose directions are kept; only the anchor moves.
    """
    spread = curvature.spread
    if reuse is None:
        factors = curvature.factor(energies, ranks)
        parts = [truncate(*factor, rank) for factor, rank in zip(factors, ranks, strict=True)]
    else:
        parts = [(block.U, block.lam, block.rho) for block in reuse.blocks]
    tiny = torch.finfo(torch.float32).tiny
    tops = []
    for (_, lam, _), energy in zip(parts, energies, strict=True):
        share = energy.amax(-1) / energy.sum(-1).clamp(min=tiny)
        tops.append((share * lam[:, 0]).amax())
    top = torch.stack(tops).amax().clamp(min=tiny)
    blocks = []
    for index, ((U, lam, rho), energy, chosen) in enumerate(zip(parts, energies, rows, strict=True)):
        # lam / top first: a product of two small eigenvalue sums would underflow.
        scale = 1 / energy.sum(-1).clamp(min=tiny)
        region = None if spread is None else spread.regions[index]
        block = LocalBlock(U, lam / top, rho / top, scale, energy, chosen, lam, lam, region)
        blocks.append(block)
    model = LocalModel(blocks, spread)
    model.stand(weights, matrices)
    return model
