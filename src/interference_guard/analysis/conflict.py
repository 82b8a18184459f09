"""The subspace two domains share: angles between their directions, and how much of an edit lies inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from interference_guard.errors import CheckpointError

from .checkpoints import Weights
from .part import displacement
from .state import DomainRecord, StateFile

# Cosine of a principal angle from which a pair of directions counts as shared: 45 degrees.
SHARED = 0.5**0.5


@dataclass
class Conflict:
    """What two domains share in each parameter.

    Args:
        cosines: Cosines of the principal angles by parameter, ``(matrices, k)`` descending.
        chance: The largest cosine's mean between random subspaces of the same sizes, by parameter.
        share: Part of the squared displacement inside the first domain's directions, all parameters together.
        flat_share: What `share` is for a displacement spread evenly over all directions: rank over width.
        shared_interference: Predicted interference of the displacement's part along shared directions, over that
            of the whole displacement. It can pass 1, where the two parts' effects cancel.
        inside_interference: Part of it inside the domain's directions.
    """

    cosines: dict[str, Tensor]
    chance: dict[str, float]
    share: float
    flat_share: float
    shared_interference: float
    inside_interference: float

    def mean_cosine(self) -> float:
        """Mean of the largest cosine over parameters."""
        tops = [float(item[..., 0].mean()) for item in self.cosines.values()]
        return sum(tops) / max(len(tops), 1)

    def mean_chance(self) -> float:
        """Mean over parameters of the largest cosine that random subspaces of the same sizes have on average."""
        return sum(self.chance.values()) / max(len(self.chance), 1)


def conflict_subspace(
    record: DomainRecord, other: DomainRecord, before: Weights, after: Weights, seed: int = 0
) -> Conflict:
    """Compare two domains' directions and see where a displacement lies.

    Args:
        record: The domain that may be harmed; needs a local model.
        other: The domain that trained from `before` to `after`.
        before: Weights before it.
        after: Weights after it.
        seed: Of the random subspaces that give the angles' chance level.

    Raises:
        CheckpointError: If the checkpoints are not of the state's model, or the domains of two models.
        UnknownDomainError: If the first domain has no local model.
    """
    end, start = record.state.running(after), record.state.running(before)
    if _shapes(record.state) != _shapes(other.state):
        raise CheckpointError(
            f"The guard states in {record.state.folder} and {other.state.folder} are of different architectures. "
            "Give two domains of one run."
        )
    generator = torch.Generator().manual_seed(seed)
    cosines: dict[str, Tensor] = {}
    chance: dict[str, float] = {}
    total = kept = flat = interference = inside = shared = 0.0
    for part, (name, V) in zip(record.parts(), other.directions(), strict=True):
        block = part.block
        U = block.U
        left, values, _ = torch.linalg.svd(U.mT @ V, full_matrices=False)
        if part.view.kind != "vector":
            cosines[name] = values
            chance[name] = _chance(U, V, generator)
        seen = part.see(displacement(name, end, before=start))
        energy = float(seen.lengths.sum())
        total += energy
        flat += energy * min(U.shape[2] / part.view.width, 1.0)
        kept += float(seen.z.double().square().sum())
        first, rest = part.interference(seen)
        inside += float(first.double().sum())
        interference += float(first.double().sum() + rest.double().sum())
        # Directions of the first domain that the other has too, as a projector on the coordinates z.
        common = left * (values > SHARED).unsqueeze(-2)
        within = block.select(seen.z @ (common @ common.mT))
        shared += float((block.weights() * within.square()).double().sum() / 2)
    return Conflict(
        cosines,
        chance,
        kept / total if total else 0.0,
        flat / total if total else 0.0,
        shared / interference if interference else 0.0,
        inside / interference if interference else 0.0,
    )


def _shapes(state: StateFile) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(view.shape)) for name, view in state.views.items()]


def _chance(U: Tensor, V: Tensor, generator: torch.Generator) -> float:
    width = U.shape[1]
    sizes = [int(item.abs().sum((0, 1)).count_nonzero()) or 1 for item in (U, V)]
    shapes = [(width, min(size, width)) for size in sizes]
    draws = [torch.linalg.qr(torch.randn(shape, generator=generator, device="cpu")).Q for shape in shapes]
    return float(torch.linalg.matrix_norm(draws[0].T @ draws[1], 2).clamp(max=1.0))
