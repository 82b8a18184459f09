"""The domains of a run as the YAML file names them, and their rows in one table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import LargeList, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError

from interference_guard.errors import ConfigError
from interference_guard.names import named
from interference_guard.telling import warn

from .order import integer, is_weight

FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# How the types of numbers begin.
NUMBERS = ("int", "uint", "float")


@dataclass
class DomainSettings:
    """One domain of a run.

    Args:
        name (`str`): Its name, as metrics show it.
        path (`str`): A local .json, .jsonl, .parquet or .csv file, or a data set's name for `load_dataset`. Its
            rows need a `prompt`.
        rewards (`list[str]`): Reward functions, ``"package.module.function"`` or ``"file.py:function"``; they
            see the domain's rows alone, and are added up.
        batches (`int`, *optional*): Generation batches; by default as many full ones as there are rows for.
        weight (`float`, *optional*, defaults to `1.0`): Chance of a batch with ``order: weights``.
        config (`str`, *optional*): Configuration of the data set.
        split (`str`, *optional*, defaults to `"train"`): Its split.

    Raises:
        ConfigError: If a field has no value that it may have.
    """

    name: str
    path: str
    rewards: list[str]
    batches: int | None = None
    weight: float = 1.0
    config: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if not named(self.name):
            raise ConfigError(
                f"A domain (path={self.path!r}) has name={self.name!r}; it must be text, of one character "
                "at least. Put it in quotes where YAML reads something else."
            )
        if not isinstance(self.path, str) or not self.path:
            raise self._refused("path", "it must be a file, or the name of a data set.")
        # As it stands in the file.
        rewards: Any = self.rewards
        if isinstance(rewards, str):
            raise self._refused("rewards", f"it must be a list, [{rewards}].")
        if not isinstance(rewards, list | tuple) or not all(isinstance(path, str) for path in rewards):
            raise self._refused("rewards", "it must be a list of functions, ['file.py:function'].")
        if self.batches is not None and (integer(self.batches) is None or self.batches < 0):
            raise self._refused("batches", "it must be an integer of at least 0, without quotes.")
        if not is_weight(self.weight):
            raise self._refused(
                "weight", "it must be a number of at least 0. Write it as 0.01, without quotes or an exponent."
            )

    def _refused(self, setting: str, allowed: str) -> ConfigError:
        return ConfigError(f"The domain {self.name!r} has {setting}={getattr(self, setting)!r}; {allowed}")


def load_rows(domains: list[DomainSettings], column: str) -> Any:
    """All domains' rows in one data set, each with its domain in `column`.

    Raises:
        ConfigError: If there is no domain, two have one name, a file is missing or cannot be read, a data set has
            no prompts, or columns of one name have types that do not go together.
    """
    names = [domain.name for domain in domains]
    if not domains or len(set(names)) < len(names):
        raise ConfigError(f"domains are {names}; a run needs at least one, and each name once.")
    parts = []
    for domain in domains:
        rows = _read(domain)
        if "prompt" not in rows.column_names:
            raise ConfigError(
                f"The rows of domain {domain.name!r} ({domain.path}) have no column 'prompt'; they have "
                f"{rows.column_names}. Prepare them first, see examples/trl/prepare.py."
            )
        if column in rows.column_names:
            rows = rows.remove_columns(column)
        parts.append(rows.add_column(column, [domain.name] * len(rows)))
    try:
        return concatenate_datasets(_alike(parts))
    except ValueError as error:
        kinds = {name: dict(part.features) for name, part in zip(names, parts, strict=True)}
        raise ConfigError(
            f"The rows of the domains {names} do not go into one table: {error} Their columns are {kinds}. Give "
            "columns of one name one type, for instance text, or other names."
        ) from error


def _read(domain: DomainSettings) -> Any:
    suffix = os.path.splitext(domain.path)[1].lower()
    if suffix not in FILES:
        return load_dataset(domain.path, domain.config, split=domain.split)
    try:
        return load_dataset(FILES[suffix], data_files=domain.path, split="train")
    except FileNotFoundError as error:
        raise ConfigError(
            f"Domain {domain.name!r} has path={domain.path!r}, and {os.getcwd()!r} has no such file."
        ) from error
    except (DatasetsError, StopIteration, OSError, ValueError) as error:
        # Each format fails in a way of its own, and an empty file without a word.
        cause = error.__cause__ or error
        why = f"{type(cause).__name__}: {cause}" if str(cause) else "it holds no rows"
        raise ConfigError(
            f"Domain {domain.name!r} has path={domain.path!r}, which cannot be read as {FILES[suffix]}: {why}. "
            "Mend the file, or write it anew."
        ) from error


def _alike(parts: list[Any]) -> list[Any]:
    """Data sets with the columns of one name cast to one type, as far as numbers and text go."""
    for column in dict.fromkeys(name for part in parts for name in part.features):
        kinds = [part.features[column] for part in parts if column in part.features]
        if any(kind != kinds[0] for kind in kinds):
            wide = _wide(column, kinds)
            parts = [_cast(part, column, wide) for part in parts]
    return parts


def _cast(part: Any, column: str, wide: Any) -> Any:
    kind = part.features.get(column)
    to = wide if _is_number(kind) else _plain(kind)
    return part if to == kind else part.cast_column(column, to)


def _wide(column: str, kinds: Sequence[Any]) -> Any:
    """One type for a column's numbers: the one they have, floats where any are, else 64-bit integers."""
    found = {kind.dtype for kind in kinds if _is_number(kind)}
    if len(found) < 2:
        return Value(found.pop()) if found else None
    floats = [kind.startswith("float") for kind in found]
    if any(floats) and not all(floats):
        warn(
            f"Column {column!r} holds integers in some domains and other numbers elsewhere: its integers "
            "become floats (2 is 2.0), also for reward functions. Write text where that matters."
        )
    return Value("float64" if any(floats) else "int64")


def _plain(kind: Any) -> Any:
    """A type with text and lists as JSON brings them; from CSV, pandas and polars they have 64-bit offsets."""
    if isinstance(kind, dict):
        return {name: _plain(inner) for name, inner in kind.items()}
    if isinstance(kind, LargeList):
        return List(_plain(kind.feature))
    if isinstance(kind, List):
        return List(_plain(kind.feature), kind.length)
    return Value("string") if kind == Value("large_string") else kind


def _is_number(kind: Any) -> bool:
    return isinstance(kind, Value) and str(kind.dtype).startswith(NUMBERS)
