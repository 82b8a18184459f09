"""Rounding to bf16 at random, so that corrections smaller than half a step of the number format are not lost.

A projection spreads its correction over a unit's whole width, so each weight moves by little. bf16 keeps eight
bits: rounded to the nearest number, most of the weights stay where they were, step after step, and the region is
left. Rounded up or down with probabilities in proportion, the expected weight is the projected one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bits of an fp32 number that bf16 drops.
DROPPED = 16


def round_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round to one of the two nearest bf16 numbers, with the value as the expectation.

    A value that bf16 can hold stays as it is, and so do infinities and NaN.

    Args:
        values: fp32, any shape.
        generator: Of the values' device; advanced by this call.

    Returns:
        bf16, of the same shape.

    >>> generator = torch.Generator().manual_seed(0)
    >>> round_at_random(torch.tensor([1.0, -0.5]), generator).tolist()
    [1.0, -0.5]
    """
    # Each of the values' size: this one's intermediate result goes before the random bits come.
    missing = values.isnan()
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(1 << DROPPED, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    # Sign and magnitude are apart, so adding to the dropped bits carries away from zero for either sign. Those of
    # an infinity are zero, and nothing is carried; a NaN's may be all ones.
    rounded = noise.add_(bits).bitwise_and_(-1 << DROPPED).view(torch.float32)
    return torch.where(missing, values, rounded, out=rounded).to(torch.bfloat16)
