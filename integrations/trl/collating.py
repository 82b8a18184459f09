"""The domains of supervised rows on their way through a data loader, as bytes in a tensor of the batch."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interference_guard.errors import HostError
from interference_guard.names import named

# No name that a host could have for a tensor of its own.
DOMAIN_ID = "interference_guard_domain"
# Of a name in UTF-8. One width for all batches: accelerate joins those of several ranks.
WIDTH = 256
# Before what is no name: no UTF-8 has this byte.
UNNAMED = b"\xff"
# What a `NamingCollator` keeps itself.
OWN = ("collator", "column", "width", "strip", "active")


class NamingCollator:
    """A trainer's collator that adds the names' bytes to the batch.

    It may run in a worker process, or on the first rank for all others. What it knew about other rows would be
    lost there, so names are numbered later, in the main process of each rank; only tensors get that far.

    The trainer may ask what it has for a collator, or change a setting of it: for `isinstance`, and in attributes
    that can be read and set, this one is the trainer's own.

    Args:
        collator: The trainer's own.
        column: The column of the domain.
        width: Bytes a name may have.
        strip: Whether the domain is taken out of the rows, as the trainer does with columns it has no use for.
    """

    def __init__(self, collator: Any, column: str, width: int = WIDTH, strip: bool = True) -> None:
        self.collator, self.column, self.width, self.strip = collator, column, width, strip
        self.active = True

    def _kind(self) -> type[Any]:
        # `inspect` reads further into what says that it is a function.
        return type(self) if inspect.isroutine(self.collator) else type(self.collator)

    __class__ = property(_kind)

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling ask for some before there is a collator.
        if name.startswith("__") or name in OWN:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.collator, name, value)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # As pickle would find it by itself, were the class not that of the trainer's collator.
        return NamingCollator, (self.collator, self.column, self.width, self.strip), vars(self).copy()

    def __call__(self, rows: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """The trainer's batch, and in it the names; the trainer's alone once it is not `active` any more."""
        if not self.active:
            return self.collator(rows, *args, **kwargs)
        names = pack([row.get(self.column) for row in rows], self.width)
        if self.strip:
            rows = [{key: value for key, value in row.items() if key != self.column} for row in rows]
        batch = self.collator(rows, *args, **kwargs)
        # In anything else nothing could be added: the trainer is told so at its first step.
        if isinstance(batch, MutableMapping):
            batch[DOMAIN_ID] = names
        return batch


def pack(names: Sequence[object], width: int = WIDTH) -> Tensor:
    """Names as ``(names, width)`` uint8; of what is no name, its `repr` as far as there is room.

    Raises:
        HostError: If a name is too long.
    """
    table = torch.zeros(len(names), width, dtype=torch.uint8, device="cpu")
    for row, name in zip(table, names, strict=True):
        written = name.encode() if named(name) else (UNNAMED + repr(name).encode())[:width]
        if len(written) > width:
            raise HostError(
                f"The domain {str(name)[:40]!r}... has {len(written)} bytes in UTF-8; {width} are allowed in a "
                "stream of rows. Give it a shorter name."
            )
        row[: len(written)] = torch.frombuffer(bytearray(written), dtype=torch.uint8)
    return table


def unpack(table: Tensor) -> list[str]:
    """The names that `pack` wrote, and empty ones for what is none."""
    written = [bytes(row).rstrip(b"\0") for row in table.tolist()]
    return ["" if name.startswith(UNNAMED) else name.decode() for name in written]


def unnamed(row: Tensor) -> str:
    """What `pack` found in place of a name, as `repr` writes it, from the row of its table."""
    return bytes(row.tolist()).rstrip(b"\0").removeprefix(UNNAMED).decode(errors="ignore")
