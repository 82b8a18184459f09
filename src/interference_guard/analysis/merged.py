"""A LoRA adapter together with its base model, read as if the two were merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from interference_guard.errors import CheckpointError
from interference_guard.units import stored_transposed

from .adapter import AdapterConfig, read_adapter_config
from .checkpoints import Checkpoint
from .running import ADAPTER, saved_name

MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")


@dataclass(frozen=True)
class Factors:
    """The factors of one weight.

    Args:
        reader: Name of A, ``(rank, in)``.
        writer: Name of B, ``(out, rank)``.
        scaling: What B A is multiplied with.
        transposed: Whether the weight is stored (in, out), as embeddings and Conv1D layers are.
        magnitude: Name of DoRA's row lengths, ``(out,)``, or None.
    """

    reader: str
    writer: str
    scaling: float
    transposed: bool
    magnitude: str | None = None


class MergedCheckpoint:
    """W + scaling B A, computed for the rows that are asked for; whole weights that an adapter brings replace W.

    Where an adapter brings a layer's weight beside its factors, as peft does of embeddings and heads, that is W.

    Args:
        base: The model.
        adapter: LoRA factors for it, with their `adapter_config.json`; one rank and scaling or several, rsLoRA,
            and DoRA on linear layers.

    Raises:
        CheckpointError: If the adapter is of another kind, or does not fit the base.
    """

    def __init__(self, base: Checkpoint, adapter: Checkpoint) -> None:
        self.base, self.adapter = base, adapter
        config = read_adapter_config(adapter.path)
        flipped = stored_transposed(base.model_type, base.shapes)
        self._factors: dict[str, Factors] = {}
        self._brought: dict[str, str] = {}
        for name in adapter.shapes:
            bare = name.removeprefix(ADAPTER)
            if bare.endswith((".lora_A.weight", ".lora_embedding_A")):
                owner = bare.rpartition(".lora_")[0]
                target = self._target(owner)
                self._factors[target] = self._pair(name, owner, target, config, flipped)
            elif ".lora_" not in bare:
                target = bare.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                target = saved_name(target, base.shapes) or target
                self._check(target, adapter.shapes[name])
                self._brought[target] = name
            elif not bare.endswith((".lora_B.weight", ".lora_embedding_B", *MAGNITUDES)):
                raise CheckpointError(
                    f"{adapter.path} holds {name!r}, which is no LoRA factor known here. Merge it with "
                    "merge_and_unload() and compare the merged model."
                )

    @property
    def label(self) -> str:
        """What a message calls it."""
        return self.adapter.label

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The base's shapes."""
        return self.base.shapes

    @property
    def model_type(self) -> str | None:
        """The base's architecture."""
        return self.base.model_type

    @property
    def tied(self) -> bool:
        """Whether the base's config.json says that the head is the embedding."""
        return self.base.tied

    @property
    def paths(self) -> tuple[Path, ...]:
        """The base and the adapter."""
        return (*self.base.paths, *self.adapter.paths)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Merged rows in fp32."""
        brought = self._brought.get(name)
        if brought is None:
            found = self.base.rows(name, first, last)
        else:
            found = self.adapter.rows(brought, first, last)
        pair = self._factors.get(name)
        if pair is None:
            return found
        if pair.transposed:
            A, B = self.adapter.rows(pair.reader)[:, first:last], self.adapter.rows(pair.writer)
            found += pair.scaling * (A.T @ B.T)
        else:
            A, B = self.adapter.rows(pair.reader), self.adapter.rows(pair.writer, first, last)
            found += pair.scaling * (B @ A)
        if pair.magnitude is not None:
            lengths = torch.linalg.vector_norm(found, dim=1)
            found *= (self.adapter.rows(pair.magnitude, first, last).flatten() / lengths).unsqueeze(1)
        return found

    def _target(self, owner: str) -> str:
        target = saved_name(f"{owner}.weight", self.base.shapes)
        if target is None:
            raise CheckpointError(
                f"{self.adapter.path} changes '{owner}.weight', which {self.base.path} does not have. Give the "
                "base model the adapter was trained on."
            )
        return target

    def _pair(
        self, reader: str, owner: str, target: str, config: AdapterConfig, flipped: frozenset[str]
    ) -> Factors:
        embedding = reader.endswith(".lora_embedding_A")
        writer = reader.replace(".lora_embedding_A", ".lora_embedding_B").replace(".lora_A.", ".lora_B.")
        shapes, folder = self.adapter.shapes, self.adapter.path
        if writer not in shapes:
            raise CheckpointError(f"{folder} holds {reader!r} without {writer!r}. Copy the adapter again.")
        rank = shapes[reader][0]
        if rank != config.rank(owner) or shapes[writer][-1] != rank:
            raise CheckpointError(
                f"{folder}: the factors of {owner!r} have rank {rank} and {shapes[writer][-1]}, "
                f"adapter_config.json says {config.rank(owner)}. Give the configuration "
                "saved with the adapter."
            )
        outer = (shapes[writer][0], shapes[reader][-1])
        # Of a square weight the shape does not tell.
        conv = owner in flipped if flipped else config.fan_in_fan_out and outer[0] == outer[1]
        transposed = embedding or conv or (outer != self.base.shapes[target] and config.fan_in_fan_out)
        self._check(target, outer[::-1] if transposed else outer)
        start = reader.rpartition(".lora_")[0]
        magnitude = next((start + ending for ending in MAGNITUDES if start + ending in shapes), None)
        if magnitude is not None and transposed:
            raise CheckpointError(
                f"{folder} has DoRA on {owner!r}, which is stored transposed; only on linear layers is it merged "
                "here. Merge it with merge_and_unload() and compare the merged model."
            )
        return Factors(reader, writer, config.scaling(owner), transposed, magnitude)

    def _check(self, target: str, shape: tuple[int, ...]) -> None:
        expected = self.base.shapes.get(target)
        if shape != expected:
            raise CheckpointError(
                f"{self.adapter.path} and {self.base.path} are of different architectures: {target!r} is {shape} "
                f"in the adapter and {expected} in the base. Give the adapter's own base model."
            )
