"""A saved checkpoint, single or sharded, a model or a LoRA adapter, opened without loading it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from interference_guard.errors import CheckpointError
from interference_guard.units import UnitLayout, canonical_name, stored_transposed

from .tensorfile import Entry, read_header

SINGLE = ("model.safetensors", "adapter_model.safetensors")
INDEX = "model.safetensors.index.json"
# What stores packed weights. Not int64 and bool: these are positions and masks, which some models save.
PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)
HEAD = "lm_head.weight"
EMBEDDINGS = frozenset(("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"))
# Elements read at once, 4 MiB in fp32: pieces that fit a processor's cache are also the fastest.
PIECE = 1 << 20
# Called with each parameter's name when it is done.
Advance = Callable[[str], None]


class Weights(Protocol):
    """Named floating-point weights that are read in rows."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by canonical name."""
        ...

    @property
    def label(self) -> str:
        """What a message calls them."""
        ...

    @property
    def model_type(self) -> str | None:
        """The architecture's name in config.json, None where there is none."""
        ...

    @property
    def tied(self) -> bool:
        """Whether config.json says that the head is the embedding."""
        ...

    @property
    def paths(self) -> tuple[Path, ...]:
        """The folders or files that are read."""
        ...

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of the first axis in fp32, checked to be finite."""
        ...


class Checkpoint:
    """The weights in a folder or a safetensors file; tensors are read when asked for.

    Args:
        path: A folder with `model.safetensors`, its shards and their index, or `adapter_model.safetensors`;
            or one safetensors file.

    Raises:
        CheckpointError: If there is no such file, a shard is missing or damaged, or the weights are packed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = _config(path)
        self.entries: dict[str, Entry] = {}
        for file, wanted in _files(path).items():
            found = read_header(file)
            absent = sorted(wanted - found.keys())
            if absent:
                raise CheckpointError(
                    f"{file} lacks {len(absent)} tensors that the index names, for instance {absent[0]!r}. "
                    "Copy the checkpoint again."
                )
            for name, entry in found.items():
                if 0 in entry.shape:
                    # Nothing in it can change.
                    continue
                if entry.dtype is None or entry.dtype.is_floating_point:
                    self.entries[canonical_name(name)] = entry
                # A mask may be stored as bytes: it has leading axes of length 1.
                elif entry.dtype in PACKED and len(entry.shape) > 1 and entry.shape[0] > 1:
                    raise CheckpointError(
                        f"{file} holds packed weights: {name!r} has shape {entry.shape} and dtype {entry.dtype}. "
                        "Only floating-point weights can be measured. Save the model dequantized."
                    )
        if not self.entries:
            raise CheckpointError(
                f"{path} holds no floating-point tensor. Give a model's or an adapter's folder."
            )
        self._shapes = {name: entry.shape for name, entry in self.entries.items()}
        # An adapter's own factors are whole, whatever the base that its config.json is of.
        if self._config.get("quantization_config") and not self.adapter:
            raise CheckpointError(
                f"{path} holds packed weights: its config.json has a quantization_config. Only floating-point "
                "weights can be measured. Save the model dequantized, without that entry."
            )

    @property
    def label(self) -> str:
        """What a message calls it."""
        return str(self.path)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by canonical name."""
        return MappingProxyType(self._shapes)

    @property
    def model_type(self) -> str | None:
        """The architecture's name in the config.json beside the weights, None where there is none."""
        found = self._config.get("model_type")
        return None if found is None else str(found)

    @property
    def tied(self) -> bool:
        """Whether the config.json beside the weights says that the head is the embedding."""
        tables = (self._config, self._config.get("text_config"))
        return any(isinstance(table, dict) and table.get("tie_word_embeddings") is True for table in tables)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The folder or the file."""
        return (self.path,)

    @property
    def adapter(self) -> bool:
        """Whether these are LoRA factors and not a model."""
        return any(".lora_" in name for name in self._shapes)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of the first axis in fp32.

        Raises:
            CheckpointError: If one of them is not finite.
        """
        found = self.entries[name].read(first, last).float()
        if not bool(found.isfinite().all()):
            raise CheckpointError(
                f"{self.path}: {name} holds NaN or infinity. Such weights cannot be measured; use an earlier "
                "checkpoint of the run."
            )
        return found


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint; see `Checkpoint`."""
    return Checkpoint(Path(path))


def _files(path: Path) -> dict[Path, set[str]]:
    """Safetensors files of a checkpoint and the tensors each must have."""
    if path.is_file():
        return {path: set()}
    # As transformers does: an index beside one whole file was left by an earlier save.
    if (path / SINGLE[0]).is_file():
        return {path / SINGLE[0]: set()}
    index = path / INDEX
    if index.is_file():
        try:
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards: dict[Path, set[str]] = {}
            for name, file in table.items():
                if Path(file).is_absolute() or ".." in Path(file).parts:
                    raise ValueError(f"{file!r} lies outside of the checkpoint")
                shards.setdefault(path / file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index} is damaged: {type(error).__name__}: {error}. Copy the checkpoint again."
            ) from error
        absent = sorted(file.name for file in shards if not file.is_file())
        if absent:
            raise CheckpointError(
                f"{path} lacks {len(absent)} of {len(shards)} shards that {INDEX} names, for instance "
                f"{absent[0]!r}. Copy the missing files."
            )
        return shards
    if (path / SINGLE[1]).is_file():
        return {path / SINGLE[1]: set()}
    inner = sorted({file.parent.name for name in (*SINGLE, INDEX) for file in path.glob(f"*/{name}")})
    if inner:
        raise CheckpointError(
            f"{path} holds no checkpoint itself, but some in the folders {inner}. Give one of these."
        )
    raise CheckpointError(
        f"{path} holds no checkpoint: expected one of {[*SINGLE, INDEX]}. Give the folder that save_pretrained "
        "or the trainer wrote; files named .bin must be saved as safetensors first."
    )


def check_same(first: Weights, second: Weights) -> None:
    """Refuse two checkpoints of different architectures.

    A head that config.json says is tied to the embedding may be stored on one side alone.

    Raises:
        CheckpointError: Naming the first tensor that differs.
    """
    a, b = first.shapes, second.shapes
    tied = first.tied or second.tied
    different = sorted(
        name for name in {*a, *b} if a.get(name) != b.get(name) and not (tied and _spare_head(name, a, b))
    )
    if different:
        name = different[0]
        raise CheckpointError(
            f"{first.label} and {second.label} are of different architectures: {len(different)} of "
            f"{len({*a, *b})} tensors differ, for instance {name!r} with shape {a.get(name)} and "
            f"{b.get(name)}. Compare checkpoints of one model."
        )


def _spare_head(name: str, a: Mapping[str, tuple[int, ...]], b: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether this is a head that one side alone stores, with the shape of the embedding of both."""
    if (name in a) == (name in b) or not f".{name}".endswith(f".{HEAD}"):
        return False
    shape = a.get(name, b.get(name))
    return any(a[item] == b.get(item) == shape for item in a if _embeds(item))


def stored_twice(weights: Weights) -> tuple[str, str] | None:
    """Names of an embedding and of the head tied to it, where both are stored."""
    if not weights.tied:
        return None
    heads = [name for name in weights.shapes if f".{name}".endswith(f".{HEAD}")]
    pairs = ((name, head) for head in heads for name in weights.shapes if _embeds(name))
    return next((pair for pair in pairs if weights.shapes[pair[0]] == weights.shapes[pair[1]]), None)


def _embeds(name: str) -> bool:
    return any(part in EMBEDDINGS for part in name.split(".")[-2:-1])


def unit_layout(weights: Weights, overrides: Mapping[str, str] = MappingProxyType({})) -> UnitLayout:
    """Unit views of a checkpoint's tensors; its config.json tells which layers are stored transposed."""
    empty = ((name, torch.empty(shape, device="meta")) for name, shape in weights.shapes.items())
    return UnitLayout(empty, overrides, transposed=stored_transposed(weights.model_type, weights.shapes))


def _config(path: Path) -> dict[str, Any]:
    """What config.json beside the weights says; empty where there is none."""
    folder = path if path.is_dir() else path.parent
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def pieces(shape: tuple[int, ...], limit: int = PIECE) -> Iterator[tuple[int, int]]:
    """Row ranges that hold at most `limit` elements, at least one row each."""
    count = shape[0] if shape else 1
    row = 1
    for length in shape[1:]:
        row *= length
    step = max(1, limit // max(row, 1))
    for first in range(0, count, step):
        yield first, min(first + step, count)


def resolve(name: str, names: Iterable[str]) -> str | None:
    """The checkpoint's name of a parameter of the running model; peft saves adapters without their name.

    Examples:
        >>> resolve("m.q.lora_A.default.weight", ["m.q.lora_A.weight"])
        'm.q.lora_A.weight'
        >>> resolve("m.lm_head.modules_to_save.default.weight", ["m.lm_head.weight"])
        'm.lm_head.weight'
    """
    known = names if isinstance(names, Mapping | set) else set(names)
    bare = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    bare = re.sub(r"(\.lora_\w+)\.[^.]+(\.weight)$", r"\1\2", bare)
    # These are parameters and no layers.
    bare = re.sub(r"(\.lora_embedding_[AB]|\.trainable_tokens_delta)\.[^.]+$", r"\1", bare)
    return next((item for item in (name, bare) if item in known), None)
