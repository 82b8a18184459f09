"""Nearest point of a trust region: one secular equation.

The region of a domain is { z : sum_i w_i z_i^2 / 2 <= radius }, z the displacement seen through the
domain's directions. Its nearest point to z is z / (1 + mu w) with mu >= 0 the root of

    f(mu) = sum_i w_i z_i^2 / (1 + mu w_i)^2 / 2 = radius.

1/sqrt(f) is concave and increasing, so Newton's method on it started left of the root rises to the root
and never passes it (More and Sorensen, 1983, on the trust-region subproblem).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEWTON_STEPS = 48
# Relative gap between f(mu) and the radius that is scaled off.
CONVERGED = 1e-4


def subspace_energy(z: Tensor, w: Tensor) -> Tensor:
    """Sum of w z^2 / 2, a 0-d tensor."""
    return torch.dot((w * z).flatten(), z.flatten()) / 2


def shrinkage(z: Tensor, w: Tensor, radius: Tensor, metric: Tensor | None = None) -> Tensor:
    """Factors that move z to the nearest point of the region: the point is ``factors * z``.

    The device is read twice an iteration: passes over all coordinates cost more than to wait for a number, and
    mostly a few of them are enough.

    Args:
        z: Coordinates of the displacement, ``(n,)`` fp32.
        w: Weights, ``(n,)`` fp32, not negative.
        radius: 0-d fp32 tensor, above 0.
        metric: What a change of each coordinate counts, ``(n,)`` fp32 above 0: the point is the one that is
            nearest by ``sum(metric * change^2)``. None counts all alike.

    Returns:
        ``(n,)`` fp32 in (0, 1]; exactly 1 everywhere when z is inside.
    """
    # Unit-free: with a_i the terms over the radius and v_i = w_i / max w, f(nu) = sum a / (1 + nu v)^2. In a
    # metric m the point is z / (1 + mu w / m), so only v differs.
    price = w if metric is None else w / metric
    v = price / price.max().clamp(min=torch.finfo(w.dtype).tiny)
    a = _terms(z, w, radius)
    total = a.sum().item()
    # Weights that are no numbers have no nearest point; what they were before is gone.
    if total <= 1 or not math.isfinite(total):
        return torch.ones_like(z)
    factors = _root(a, v, total)
    left = (a * factors.square()).sum()
    # What is left outside is taken off evenly where it counts, so the result is inside.
    return torch.where(v > 0, factors * left.clamp(min=1).rsqrt(), factors)


def _root(a: Tensor, v: Tensor, total: float) -> Tensor:
    """Factors at the root, with as few passes over the terms as possible."""
    # From below: all terms at the largest weight.
    nu = max(total**0.5 - 1, 0.0)
    one = torch.ones((), dtype=v.dtype, device=v.device)
    for _ in range(NEWTON_STEPS):
        divisor = torch.add(one, v, alpha=nu)
        part = a / divisor
        part /= divisor
        f = part.sum().item()
        if f - 1 <= CONVERGED:
            return divisor.reciprocal_()
        part /= divisor
        slope = torch.dot(part, v).item()
        if slope <= 0:
            break
        # Newton on 1/sqrt(f) - 1: d/dnu f = -2 slope.
        nu = min(nu + (f**0.5 - 1) * f / slope, torch.finfo(v.dtype).max)
    return torch.add(one, v, alpha=nu).reciprocal_()


def _terms(z: Tensor, w: Tensor, radius: Tensor) -> Tensor:
    """Terms w z^2 / (2 radius), without under- or overflow of the intermediate square."""
    root = (w / 2).sqrt() * (z / radius.sqrt())
    return root.square()
