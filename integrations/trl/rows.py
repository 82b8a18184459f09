"""Domains of a trainer's rows: read from one column, numbered, and refused where they are missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interference_guard.errors import ConfigError, HostError, MissingDomainError
from interference_guard.names import named


class DomainTable:
    """Numbers of domain names, the same on every rank once all ranks have seen the same dataset.

    Args:
        column: The dataset column that holds a row's domain.
        setting: What names another one, as errors say it.
    """

    def __init__(self, column: str, setting: str = "GuardConfig(domain_column=...)") -> None:
        self.column, self.setting = column, setting
        self.names: list[str] = []
        # Of reference domains, which no row that is trained may have.
        self.reserved: frozenset[str] = frozenset()

    def add(self, names: Sequence[str]) -> None:
        """Number names that are new, in the order given."""
        self.names += [name for name in names if name not in self.names]

    def check(self, names: Iterable[object]) -> None:
        """Raise `ConfigError` where rows that are trained have the name of a reference domain."""
        clash = sorted(self.reserved.intersection(filter(named, names)))
        if clash:
            raise ConfigError(
                f"Reference domain {clash[0]!r} is also a domain of the training rows. Give the reference a name "
                "of its own, or leave these rows out."
            )

    def number(self, row: Mapping[str, Any]) -> int:
        """Number of a row's domain.

        Raises:
            MissingDomainError: If the row has none; the message shows the row.
        """
        name = row.get(self.column)
        if not named(name):
            raise self.missing(repr(name), row)
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def numbers(self, rows: Sequence[Mapping[str, Any]], needed: bool = True) -> Tensor:
        """Numbers of the rows' domains, ``(rows,)`` int64 on the CPU: reading them never waits for a device.

        Where they are not `needed`, as in an evaluation, a row without one is -1.
        """
        found = [self.number(row) if needed or named(row.get(self.column)) else -1 for row in rows]
        return torch.tensor(found, dtype=torch.int64, device="cpu")

    def counts(self, numbers: Tensor) -> dict[str, int]:
        """Rows of each domain that occurs."""
        found = torch.bincount(numbers, minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, found, strict=True) if count}

    def missing(self, found: str, row: Mapping[str, Any], index: int | None = None) -> MissingDomainError:
        """The error for a row whose domain is not a non-empty string.

        Args:
            found: What it has there, as `repr` writes it.
            row: The row.
            index: Its number in the dataset. Of a row that has come up it is not known: streams do not number
                their rows, and a batch may hold each several times.
        """
        shown = {key: str(value)[:60] for key, value in row.items() if key != self.column}
        which = "A row in training" if index is None else f"Row {index}"
        return MissingDomainError(
            f"{which} has {self.column}={found}: every row needs a non-empty string there. The row: {shown}. "
            f"Fill the {self.column!r} column (numbers of a ClassLabel become names by its int2str), or name "
            f"another one with {self.setting}."
        )


def read_column(dataset: Any, column: str) -> list[Any]:
    """A column's values as they are stored, whatever the rows are turned into.

    Read at once: row by row it takes a hundred times as long, and a transform would make every row.
    """
    plain = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    return list(plain[column][:])


def packs(trainer: Any) -> bool:
    """Whether a trainer has joined the rows of its dataset, and left none of their other columns."""
    args = trainer.args
    skipped = (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset", False)
    return bool(getattr(args, "packing", False)) and not skipped


def check_dataset(dataset: Any, table: DomainTable, packed: bool = False) -> list[str]:
    """Check a training dataset before anything is wired, and number its domains in sorted order.

    A streaming dataset cannot be read ahead: its rows are checked as they come.

    Args:
        dataset: The rows.
        table: Numbers the domains.
        packed: Whether the trainer `packs` its rows.

    Returns:
        The domain of each row; nothing of a stream.

    Raises:
        HostError: If there is no dataset, or it has no such column.
        MissingDomainError: If a row's domain is no string, or empty.
        ConfigError: If it is the name of a reference domain.
    """
    if dataset is None:
        raise HostError("The trainer has no train_dataset. Build the trainer with one, then attach the guard.")
    columns = getattr(dataset, "column_names", None)
    # Those of a stream may not be known; where it is packed, this one is not among them.
    found = sorted(columns or ())
    if (packed or columns is not None) and table.column not in found:
        if packed or "seq_lengths" in found:
            has = f": it has {found}" if found else ""
            raise HostError(
                f"packing=True joins rows, so the training dataset has no column {table.column!r} left{has}. Set "
                "packing=False."
            )
        hint = " If packing=True has removed it, set packing=False." if "input_ids" in found else ""
        raise HostError(
            f"The training dataset has no column {table.column!r}; it has {found}. Add it (one domain name a "
            f"row), or name another one with {table.setting}.{hint}"
        )
    if not numbered_ahead(dataset):
        return []
    names = read_column(dataset, table.column)
    unnamed = next((index for index, name in enumerate(names) if not named(name)), None)
    if unnamed is not None:
        raise table.missing(repr(names[unnamed]), dataset[unnamed], unnamed)
    table.check(names)
    table.add(sorted(set(names)))
    return names


def numbered_ahead(dataset: Any) -> bool:
    """Whether `check_dataset` can look through a dataset, so that every rank knows all its domains."""
    return hasattr(dataset, "unique") and getattr(dataset, "column_names", None) is not None
