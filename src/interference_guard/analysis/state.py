"""A guard's saved state, read without the model: what each domain's local model says of each parameter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interference_guard.config import GuardConfig
from interference_guard.curvature import nystrom, sketch_matrix
from interference_guard.errors import CheckpointError, StateError, StateVersionError, UnknownDomainError
from interference_guard.files import DETAILS, TENSORS, check_digest
from interference_guard.local_block import LocalBlock
from interference_guard.origin import VERSION
from interference_guard.places import Places, by_place
from interference_guard.residual import residual_of
from interference_guard.trust_region import TrustRegion
from interference_guard.units import UnitLayout, UnitView

from .checkpoints import Weights, resolve
from .part import Part
from .running import Running, Source, find_source
from .tensorfile import Entry, read_header

# Settings without which the tensors cannot be read.
NEEDED = ("rank", "sketch", "residual", "seed")


class DomainRecord:
    """One domain of a state file."""

    def __init__(self, state: StateFile, name: str, number: int, details: Mapping[str, Any]) -> None:
        self.state, self.name, self.details = state, name, details
        self._prefix = f"{number}/"
        try:
            self.region = TrustRegion(**details["region"])
            self.modelled = bool(details["model"])
            """Whether it has a local model: only domains that another one's steps have followed do."""
        except (KeyError, TypeError) as error:
            raise StateError(
                f"{state.folder / DETAILS} cannot be used: domain {name!r} lacks an entry, or has one that is "
                f"not known here ({type(error).__name__}: {error}). Copy it again, or use the release of "
                "interference-guard that wrote it."
            ) from error

    @property
    def moved_at(self) -> int:
        """Steps of other domains after the anchor at which its region was last moved; 0 where it stands there."""
        return int(self.details.get("renewed_at", 0))

    def tensor(self, key: str) -> Tensor | None:
        """A tensor of this domain, or None."""
        entry = self.state.entries.get(self._prefix + key)
        return None if entry is None else entry.read()

    def need(self, key: str) -> Tensor:
        """A tensor that must be there."""
        found = self.tensor(key)
        if found is None:
            raise StateError(
                f"{self.state.folder} lacks {key!r} of domain {self.name!r}. Use one that Guard.save() finished."
            )
        return found

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Index and gradient energy ``(matrices, units)`` of each block, in the guard's order."""
        index = 0
        while (energy := self.tensor(f"sums/{index}/energy")) is not None:
            yield index, energy
            index += 1

    def parts(self) -> Iterator[Part]:
        """The local model parameter by parameter.

        Raises:
            UnknownDomainError: If the domain has no local model.
        """
        if not self.modelled:
            ready = [item.name for item in self.state.domains.values() if item.modelled]
            raise UnknownDomainError(
                f"Domain {self.name!r} has no anchor in {self.state.folder}; anchored are {ready}. Its anchor is "
                "set when another domain's first step follows: use a state saved after that."
            )
        seed, residual = self.state.settings["seed"], self.state.settings["residual"]
        for index, energy, views in self.members():
            names = ("lam", "rho", "scale", "z0", "q0")
            lam, rho, scale, z0, q0 = (self.need(f"model/{index}/{name}") for name in names)
            U = self.tensor(f"model/{index}/U")
            if U is None:
                U = self.need(f"sums/{index}/basis")[:, :, : lam.shape[1]]
            rows = self.tensor(f"model/{index}/rows")
            units = energy.shape[1]
            for position, view in enumerate(views):
                count = energy.shape[0] // len(views)
                these = slice(position * count, (position + 1) * count)
                inside: Tensor | slice = slice(these.start * units, these.stop * units)
                chosen = None
                if rows is not None:
                    inside = ((rows >= these.start * units) & (rows < these.stop * units)).nonzero().flatten()
                    chosen = rows[inside] - these.start * units
                R = residual_of(view.name, count, view.width, residual, seed)
                block = LocalBlock(
                    U[these], lam[these], rho[these], scale[these], energy[these], chosen, z0[inside], q0[inside]
                )
                yield Part(view, block, R)

    def members(self) -> Iterator[tuple[int, Tensor, list[UnitView]]]:
        """Index, energy and unit views of each block."""
        names = iter(self.state.views.values())
        for index, energy in self.blocks():
            first = next(names)
            count = 1 if first.stacked else energy.shape[0]
            views = [first, *(next(names) for _ in range(count - 1))]
            if views[0].units * len(views) != energy.numel():
                raise StateError(
                    f"{self.state.folder}: the block of {first.name!r} has {energy.numel()} units, its shape "
                    f"gives {views[0].units * len(views)}. A sharded model's state holds a part for each rank: "
                    "save it whole. Where layers are stored transposed (Conv1D), give unit_overrides in the run."
                )
            yield index, energy, views

    def energies(self) -> dict[str, Tensor]:
        """Gradient energy of each unit by parameter, ``(units,)``."""
        found: dict[str, Tensor] = {}
        for _, energy, views in self.members():
            for view, piece in zip(views, energy.chunk(len(views)), strict=True):
                found[view.name] = piece.flatten()
        return found

    def curvature_places(self) -> Places:
        """Gradient energy by layer and module."""
        return by_place((name, float(energy.double().sum())) for name, energy in self.energies().items())

    def projected_places(self) -> Places:
        """Squared length of what projections took for this domain, by layer and module; maybe empty."""
        moved, start, found = self.tensor("moved"), 0, []
        if moved is None:
            return {}
        for _, energy, views in self.members():
            pieces = moved[start : start + energy.shape[0]].chunk(len(views))
            found += [(view.name, float(piece.sum())) for view, piece in zip(views, pieces, strict=True)]
            start += energy.shape[0]
        return by_place(found)

    def directions(self) -> Iterator[tuple[str, Tensor]]:
        """Leading directions by parameter, ``(matrices, width, rank)``, of domains without an anchor too."""
        rank = self.state.settings["rank"]
        for index, _, views in self.members():
            basis = self.tensor(f"sums/{index}/basis")
            if basis is None:
                sketch = self.need(f"sums/{index}/sketch")
                omega = sketch_matrix(views[0].width, self.state.settings["sketch"], self.state.settings["seed"])
                basis, _ = nystrom(sketch, omega)
            for view, piece in zip(views, basis[:, :, :rank].chunk(len(views)), strict=True):
                yield view.name, piece


class StateFile:
    """The guard's state beside a checkpoint.

    Args:
        folder: Where `interference_guard.json` and `interference_guard.safetensors` lie.

    Raises:
        StateError: If one is missing or damaged.
        StateVersionError: If the format is another version's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / DETAILS
        try:
            details = json.loads(path.read_text(encoding="utf-8"))
            if details["format"] != "interference_guard":
                raise ValueError("it was written by something else")
            if details["version"] != VERSION:
                raise StateVersionError(
                    f"{path} has format version {details['version']!r}; this version reads {VERSION}. Use the "
                    "release of interference-guard that wrote it."
                )
            self.settings: dict[str, Any] = {**details["settings"]}
            # Used when directions are read, which may be long after.
            self.settings |= {name: int(self.settings[name]) for name in NEEDED}
            self.steps = int(details["steps"])
            shapes = {name: tuple(shape) for name, shape in details["parameters"].items()}
            transposed = [str(name) for name in details["transposed"]]
            domains = dict(details["domains"])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StateError(
                f"{self.folder} has no guard state ({DETAILS}). Give a checkpoint folder of a guarded run."
            ) from error
        except OSError as error:
            raise StateError(f"{path} cannot be read: {error}. Check the path and its permissions.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(f"{path} is damaged: {type(error).__name__}: {error}. Copy it again.") from error
        try:
            self.entries: dict[str, Entry] = read_header(self.folder / TENSORS)
        except CheckpointError as error:
            raise StateError(str(error)) from error
        check_digest(self.folder / TENSORS, details, "Copy it again.")
        config = GuardConfig(unit_overrides=self.settings.get("unit_overrides"))
        empty = ((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())
        self.views: dict[str, UnitView] = UnitLayout(empty, config.overrides(), transposed=transposed).views
        self.domains: dict[str, DomainRecord] = {
            name: DomainRecord(self, name, number, item) for number, (name, item) in enumerate(domains.items())
        }

    @property
    def adapter(self) -> bool:
        """Whether it is of a guard that watched LoRA factors."""
        return any(".lora_" in name for name in self.views)

    def domain(self, name: str) -> DomainRecord:
        """One domain.

        Raises:
            UnknownDomainError: If the state does not know it.
        """
        if name not in self.domains:
            raise UnknownDomainError(
                f"Domain {name!r} is not in {self.folder}; it knows {sorted(self.domains)}. Give one of these."
            )
        return self.domains[name]

    def running(self, weights: Weights) -> Running:
        """A checkpoint's weights by the names of the guarded parameters.

        Raises:
            CheckpointError: If one is missing or has another shape.
        """
        found: dict[str, Source] = {}
        for name, view in self.views.items():
            source = find_source(name, view.shape, weights.shapes)
            if source is None:
                there = resolve(name, weights.shapes)
                shape = None if there is None else weights.shapes[there]
                raise CheckpointError(
                    f"{weights.label} and the guard state in {self.folder} are of different architectures: "
                    f"{name!r} has shape {view.shape} in the state and {shape} in the checkpoint. Give a "
                    "checkpoint of the guarded run. If it is one, its weights are saved under names that are not "
                    "known here."
                )
            found[name] = source
        return Running(weights, found, {name: view.shape for name, view in self.views.items()})
