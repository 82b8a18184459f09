"""Random directions through which what moves outside of the kept ones is seen.

The squared length of a displacement is estimated from few numbers a unit. In a wide model one has to do, so each
weight there has directions of its own: errors differ from matrix to matrix then, and in a sum over hundreds of
matrices little is left of them. Within a matrix they do not: units that move alike err alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Block

# Up to this width a weight gets all the directions that are asked for.
FULL = 512


def fewer(width: int, count: int) -> int:
    """How many of `count` directions a weight of this width gets where all of them would take too much memory."""
    return max(count * FULL // max(width, FULL), 1)


def rank_of(block: Block, rank: int) -> int:
    """Most directions kept of a matrix of a block: those of a wide vector, a norm's, take many times its room."""
    return fewer(block.width, rank) if block.views[0].kind == "vector" else rank


def residual_matrix(width: int, columns: int, seed: int) -> Tensor:
    """Random directions, ``(width, columns)`` fp32, scaled so that E|x R|^2 = |x|^2."""
    return _random((width, columns), seed * 1_000_003 + width + 500_000)


def residual_of(name: str, matrices: int, width: int, residual: int, seed: int) -> Tensor:
    """Directions of one parameter, ``(matrices, width, columns)`` fp32; those of narrow ones are all the same."""
    columns = fewer(width, residual)
    if columns == residual:
        return residual_matrix(width, residual, seed).expand(matrices, -1, -1)
    # By name, so that they are the same however parameters are stacked.
    return _random((matrices, width, columns), seed * 1_000_003 + zlib.crc32(name.encode()))


def residual_matrices(blocks: Sequence[Block], residual: int, seed: int) -> list[Tensor]:
    """Directions of each block, ``(width, columns)``, or ``(matrices, width, columns)`` where it has its own."""
    shared = full_matrices(blocks, residual, seed)
    found = []
    for block, matrix in zip(blocks, shared, strict=True):
        if fewer(block.width, residual) == residual:
            found.append(matrix)
            continue
        count = block.matrices // len(block.views)
        own = [residual_of(view.name, count, block.width, residual, seed) for view in block.views]
        found.append(torch.cat(own))
    return found


def full_matrices(blocks: Sequence[Block], residual: int, seed: int) -> list[Tensor]:
    """All `residual` directions for each block, ``(width, residual)``, one matrix shared by all of a width."""
    cache = {width: residual_matrix(width, residual, seed) for width in {block.width for block in blocks}}
    return [cache[block.width] for block in blocks]


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return gaussian.div(shape[-1] ** 0.5).float()
