"""The domain's column where the trainer would remove it: kept for the guard, and handed on to no one else."""

from __future__ import annotations

from typing import Any

from .rewards import without
from .seams import Seams


class HiddenDomain(dict[str, Any]):
    """A row without its domain's column; `domain` is what was there."""

    def __init__(self, row: dict[str, Any], column: str) -> None:
        super().__init__({key: value for key, value in row.items() if key != column})
        self.domain = row.get(column)


class DomainColumn:
    """The domain's column of a trainer's rows, kept with ``remove_unused_columns=True`` too.

    Args:
        seams: The trainer's methods, to be wrapped.
        column: The column.
    """

    def __init__(self, seams: Seams, column: str) -> None:
        self.trainer, self.column = seams.trainer, column
        # Whether the rows would not have it without the guard.
        self._added = False
        seams.wrap("_set_signature_columns_if_needed", self._keep)
        seams.afterwards(self._drop)

    def domain(self, row: dict[str, Any]) -> Any:
        """What a row has there, or had before it was hidden."""
        return row.domain if isinstance(row, HiddenDomain) else row.get(self.column)

    def for_generation(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows as the trainer may have them, which hands an environment every column by name."""
        if not self._added or getattr(self.trainer, "environment_factories", None) is None:
            return rows
        return [HiddenDomain(row, self.column) for row in rows]

    def for_rewards(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows as the reward functions may have them, which are handed every column by name.

        Raises:
            ConfigError: If one of them needs the domain and another cannot be handed it.
        """
        if not self._added:
            return rows
        shown = [{**row, self.column: row.domain} if isinstance(row, HiddenDomain) else row for row in rows]
        return without(self.trainer.reward_funcs, self.column, shown)

    def _keep(self, method: Any) -> Any:
        def keep() -> None:
            method()
            columns = self.trainer._signature_columns
            if self.column not in columns:
                self.trainer._signature_columns = [*columns, self.column]
                self._added = True

        return keep

    def _drop(self) -> None:
        if self._added:
            columns = self.trainer._signature_columns or ()
            self.trainer._signature_columns = [name for name in columns if name != self.column]
