"""What results are compared with: slow, dense, fp64 truth for the fast paths, and all names a run can log."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from interference_guard.metrics import METRICS


def nearest_in_ellipsoid(z: Tensor, w: Tensor, radius: float) -> Tensor:
    """Nearest point to z with sum w z^2 / 2 <= radius, by bisection on the multiplier."""
    z, w = z.double(), w.double()

    def energy(mu: float) -> float:
        return float((w * (z / (1 + mu * w)).square()).sum() / 2)

    if energy(0.0) <= radius:
        return z
    low, high = 0.0, 1.0 / float(w.max())
    while energy(high) > radius:
        high *= 4
    for _ in range(400):
        middle = (low + high) / 2
        low, high = (middle, high) if energy(middle) > radius else (low, middle)
    return z / (1 + high * w)


def quadratic(displacement: Tensor, energy: Tensor, second: Tensor, rank: int) -> tuple[float, float]:
    """Dense quadratic form of one matrix, inside and outside the leading eigenvectors, before scaling.

    Args:
        displacement: (units, width).
        energy: Gradient energy of each unit, (units,).
        second: Mean G'G, (width, width).
        rank: Leading directions.
    """
    values, vectors = torch.linalg.eigh(second.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    U, lam = vectors[:, :rank], values[:rank]
    rho = (values.sum() - lam.sum()) / (len(values) - rank)
    share = energy.double() / energy.double().sum()
    z = displacement.double() @ U
    outside = displacement.double().square().sum(1) - z.square().sum(1)
    return (
        float((share.unsqueeze(1) * lam * z.square()).sum() / 2),
        float((share * rho * outside).sum() / 2),
    )


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation without ties."""
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    x, y = (rank - rank.mean() for rank in ranks)
    return float((x * y).sum() / math.sqrt(float((x * x).sum() * (y * y).sum())))


def expand(domains: Iterable[str]) -> list[str]:
    """Every metric name a run over `domains` can log."""
    names = sorted(domains)
    result = []
    for pattern in METRICS:
        if "<domain>" in pattern:
            result += [pattern.replace("<domain>", name) for name in names]
        elif "<a>" in pattern:
            result += [
                pattern.replace("<a>", a).replace("<b>", b) for i, a in enumerate(names) for b in names[i + 1 :]
            ]
        else:
            result.append(pattern)
    return result
