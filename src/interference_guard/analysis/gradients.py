"""Cosines between the gradients of two domains, over the whole model and module by module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from interference_guard.errors import StateError
from interference_guard.places import place_label

from .state import DomainRecord


@dataclass
class GradientCosines:
    """Cosines of two domains' gradients.

    Args:
        whole: Over all parameters.
        modules: By ``layer.module``.
    """

    whole: float
    modules: dict[str, float]

    @property
    def most_conflicting(self) -> tuple[str, float]:
        """The module with the lowest cosine."""
        return min(self.modules.items(), key=lambda item: item[1])

    @property
    def most_synergistic(self) -> tuple[str, float]:
        """The module with the highest cosine."""
        return max(self.modules.items(), key=lambda item: item[1])


def gradient_cosines(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> GradientCosines:
    """Compare two gradients.

    Args:
        first: Gradient by parameter name, any shape; or a linear image of it, the same for both.
        second: The other domain's.

    Examples:
        >>> import torch
        >>> a, b = {"x.weight": torch.tensor([1.0, 0.0])}, {"x.weight": torch.tensor([1.0, 1.0])}
        >>> round(gradient_cosines(a, b).whole, 3)
        0.707
    """
    products: dict[str, list[float]] = {}
    for name, a in first.items():
        b = second[name]
        sums = products.setdefault(place_label(name), [0.0, 0.0, 0.0])
        sums[0] += float((a.double() * b.double()).sum())
        sums[1] += float(a.double().square().sum())
        sums[2] += float(b.double().square().sum())
    modules = {key: _cosine(*sums) for key, sums in products.items()}
    return GradientCosines(_cosine(*(sum(item[i] for item in products.values()) for i in range(3))), modules)


def stored_gradients(record: DomainRecord) -> dict[str, Tensor]:
    """A domain's mean gradient of its latest own steps, as the state holds it: seen through the test matrix.

    Products of two such images estimate those of the gradients, since the columns of the test matrix are
    orthonormal and drawn at random.

    Returns:
        By parameter ``(matrices, units, sketch)`` fp32, up to a factor common to the domain.

    Raises:
        StateError: If the run did not keep gradients.
    """
    if record.tensor("gradient/0") is None:
        raise StateError(
            f"{record.state.folder} holds no mean gradient of domain {record.name!r}: they are kept with "
            "first_order=True alone. Set it in GuardConfig, or compute the gradients from data."
        )
    found: dict[str, Tensor] = {}
    for index, _, views in record.members():
        total = record.need(f"gradient/{index}")
        for view, piece in zip(views, total.chunk(len(views)), strict=True):
            found[view.name] = piece
    return found


def _cosine(product: float, first: float, second: float) -> float:
    scale = (first * second) ** 0.5
    return product / scale if scale > 0 else 0.0
