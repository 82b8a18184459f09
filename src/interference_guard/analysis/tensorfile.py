"""One safetensors file read piece by piece.

Mapping a whole file, as the library's own reader does, counts towards a process's memory page by page;
here only the rows asked for are read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from interference_guard.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The format's own limit for the header.
HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its file, dtype, shape, and the first byte and the number of bytes."""

    path: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last` of the first axis, in the stored dtype; the tensor is the caller's own.

        Raises:
            CheckpointError: If the file ends early, or the dtype is one that cannot be read.
        """
        if self.dtype is None:
            raise CheckpointError(
                f"{self.path} holds a tensor of a packed or 8-bit floating-point dtype. Readable are "
                f"{sorted(DTYPES)}; convert the checkpoint to bf16 or fp32."
            )
        if last is None:
            last = self.rows
        row = self.size // max(self.rows, 1)
        buffer = bytearray((last - first) * row)
        with self.path.open("rb") as file:
            file.seek(self.start + first * row)
            if file.readinto(buffer) != len(buffer):
                raise CheckpointError(f"{self.path} ends too early: copy it again.")
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        if not buffer:
            return torch.empty(shape, dtype=self.dtype, device="cpu")
        return torch.frombuffer(buffer, dtype=self.dtype).reshape(shape)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

    Raises:
        CheckpointError: If the file is missing, cannot be read, is truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(HEADER_LIMIT, size - 8):
                raise ValueError("its header is longer than the file")
            table = json.loads(file.read(length))
        table.pop("__metadata__", None)
        found = {name: _entry(path, 8 + length, size, item) for name, item in table.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist. Copy the missing file, or give another folder.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Check the path and its permissions.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: {error}. Copy it again, or save the checkpoint anew."
        ) from error
    return found


def _entry(path: Path, offset: int, size: int, item: dict[str, object]) -> Entry:
    first, last = item["data_offsets"]  # type: ignore[misc]
    shape = tuple(int(length) for length in item["shape"])  # type: ignore[attr-defined]
    dtype = DTYPES.get(str(item["dtype"]))
    if not 0 <= first <= last <= size - offset:  # type: ignore[has-type]
        raise ValueError("a tensor lies beyond the end of the file")
    if dtype is not None and math.prod(shape) * dtype.itemsize != last - first:  # type: ignore[has-type]
        raise ValueError("a tensor's size does not fit its shape")
    return Entry(path, dtype, shape, offset + first, last - first)  # type: ignore[has-type]
