"""What training changed: how many parameters, how much by neuron, and whether domains change the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from interference_guard.places import place_label
from interference_guard.units import UnitView

from .checkpoints import Advance, Weights, check_same, pieces, unit_layout
from .pieces import matrix_shape, unit_piece

# The paper's two bounds.
ABSOLUTE, RELATIVE = 1e-7, 1e-3


@dataclass
class ParameterEdit:
    """One parameter's edit.

    Args:
        view: Its unit view.
        elements: Their number.
        under_both: Elements whose change is under 1e-7 and under 1e-3 of the value before.
        close: Elements whose change is at most 1e-7 + 1e-3 of the value before, as `torch.isclose` reads
            two such bounds.
        equal: Elements that did not change at all.
        units: Squared change of each unit, ``(units,)`` fp64.
        before: Squared norm of the parameter before.
    """

    view: UnitView
    elements: int = 0
    under_both: int = 0
    close: int = 0
    equal: int = 0
    units: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu"))
    before: float = 0.0


@dataclass
class Edits:
    """Edits of all parameters by canonical name."""

    parameters: dict[str, ParameterEdit]

    def summary(self, names: list[str] | None = None) -> dict[str, float]:
        """Shares over some parameters, all by default.

        Returns:
            ``under_both``, ``close`` and ``equal`` as parts of the elements, ``norm`` the length of the
            displacement and ``relative`` that over the length of the weights before.
        """
        chosen = [self.parameters[name] for name in (self.parameters if names is None else names)]
        count = max(sum(item.elements for item in chosen), 1)
        norm = sum(float(item.units.sum()) for item in chosen) ** 0.5
        before = sum(item.before for item in chosen) ** 0.5
        return {
            "elements": float(count),
            "under_both": sum(item.under_both for item in chosen) / count,
            "close": sum(item.close for item in chosen) / count,
            "equal": sum(item.equal for item in chosen) / count,
            "norm": norm,
            "relative": norm / before if before else 0.0,
        }

    def by_place(self) -> dict[str, dict[str, float]]:
        """Summaries by ``layer.module``."""
        groups: dict[str, list[str]] = {}
        for name in self.parameters:
            groups.setdefault(place_label(name), []).append(name)
        return {key: self.summary(names) for key, names in groups.items()}

    def neurons(self) -> dict[str, Tensor]:
        """Edit magnitude of each neuron by MLP: the length of the change of its gate row, up row and down column.

        Returns:
            Name of the MLP to ``(experts * channels,)`` fp64.
        """
        return neuron_sums({name: item.units for name, item in self.parameters.items()}, self.views, root=True)

    @property
    def views(self) -> dict[str, UnitView]:
        """The parameters' unit views."""
        return {name: item.view for name, item in self.parameters.items()}


def neuron_sums(
    units: Mapping[str, Tensor], views: Mapping[str, UnitView], *, root: bool = False
) -> dict[str, Tensor]:
    """Per-unit values summed over the units of each neuron, by MLP; with `root` the square root of the sum."""
    found: dict[str, Tensor] = {}
    for name, values in units.items():
        view = views[name]
        index = view.neuron_index()
        if index is None or view.neuron is None:
            continue
        empty = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device="cpu")
        total = found.setdefault(view.neuron, empty)
        total.index_add_(0, index, values.double())
    return {name: total.sqrt() for name, total in found.items()} if root else found


def measure_edits(
    before: Weights,
    after: Weights,
    overrides: Mapping[str, str] | None = None,
    advance: Advance = lambda name: None,
) -> Edits:
    """Compare two checkpoints of one model, tensor by tensor.

    Args:
        before: The earlier one.
        after: The later one.
        overrides: Unit axis by name pattern, as in `GuardConfig.unit_overrides`.
        advance: Called with each tensor's name when it is done.

    Raises:
        CheckpointError: If they are of different architectures or hold NaN.
    """
    check_same(before, after)
    views = unit_layout(before, overrides or {}).views
    found = {}
    for name, view in views.items():
        # A head tied to the embedding may be stored on one side alone; the embedding's edit is its own.
        if name not in after.shapes:
            continue
        found[name] = _edit(view, before, after)
        advance(name)
    return Edits(found)


def _edit(view: UnitView, before: Weights, after: Weights) -> ParameterEdit:
    edit = ParameterEdit(view, units=torch.zeros(view.units, dtype=torch.float64, device="cpu"))
    by_matrix = edit.units.view(matrix_shape(view))
    for first, last in pieces(view.shape):
        old, new = before.rows(view.name, first, last), after.rows(view.name, first, last)
        edit.before += float(torch.linalg.vector_norm(old)) ** 2
        change = new.sub_(old)
        piece = unit_piece(view, first, last)
        piece.part(by_matrix).add_(piece.view(change.square()).sum(-1, dtype=torch.float64))
        size = change.abs_()
        edit.elements += size.numel()
        edit.equal += size.numel() - int(size.count_nonzero())
        bound = old.abs_().mul_(RELATIVE)
        edit.under_both += int((size < bound.clamp(max=ABSOLUTE)).sum()) + _both_zero(size, bound)
        edit.close += int((size <= bound.add_(ABSOLUTE)).sum())
    return edit


def _both_zero(size: Tensor, bound: Tensor) -> int:
    # Nothing is less than a part of zero: an untouched zero counts as unchanged all the same.
    return int(((size == 0) & (bound == 0)).sum())


def top_neurons(magnitudes: Mapping[str, Tensor], share: float = 0.1) -> dict[str, Tensor]:
    """The most changed neurons over all MLPs together, as bool masks by MLP; never one that did not change."""
    if not magnitudes:
        return {}
    flat = torch.cat(list(magnitudes.values()))
    count = max(1, round(share * len(flat)))
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[flat.argsort(descending=True, stable=True)[:count]] = True
    # Where fewer changed, the rest of the order is that of the names, which is alike in any two checkpoints.
    mask &= flat > 0
    parts = torch.split(mask, [len(item) for item in magnitudes.values()])
    return dict(zip(magnitudes, parts, strict=True))
