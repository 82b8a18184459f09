"""Reward functions that score the rows of their own domain and leave the others alone."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch

from interference_guard.errors import ConfigError
from interference_guard.names import named

RewardFunction = Callable[..., Any]
"""Takes a batch's columns and returns a number or None for each completion; may be ``async``."""
# On a function by domain: the column that it reads.
READS = "interference_guard_reads"


def load(path: str) -> RewardFunction:
    """Import a reward function.

    Args:
        path: ``"package.module.function"``, or ``"folder/file.py:function"``.

    Raises:
        ConfigError: If there is no such module, file or function.
    """
    place, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    try:
        module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found: RewardFunction = getattr(module, name)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"Reward function {path!r} cannot be imported: {type(error).__name__}: {error}. Write "
            "'package.module.function' or 'folder/file.py:function', and see whether the module can be imported "
            "by itself."
        ) from error
    return found


class _Uncached(SourceFileLoader):
    """Without bytecode kept beside the file: that of an edit within the same second is of the text before."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _file(path: Path) -> ModuleType:
    """The module of a file: one for all functions that are taken from it as it is, and known to `sys.modules`."""
    key = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.resolve()).encode()))
    name = f"rewards_{path.stem}_{key:08x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path, loader=_Uncached(name, str(path)))
        if spec is None or spec.loader is None:
            raise ImportError(path)
        # Before it runs: dataclasses and pickle look their module up.
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def route(functions: Mapping[str, Sequence[RewardFunction]], column: str = "domain") -> list[RewardFunction]:
    """Reward functions of several domains as one list for a trainer: each scores its own domain's rows.

    TRL logs every function apart, under the domain's name and its own.

    Args:
        functions: Reward functions by domain.
        column: The column that holds a row's domain.

    Raises:
        ConfigError: If it is no such mapping, or a domain has none: its rows would all be without a reward. The
            functions raise it where one does not return a reward for each row.
    """
    if not isinstance(functions, Mapping) or not functions:
        found = "no domain" if isinstance(functions, Mapping) else f"a {type(functions).__name__}"
        raise ConfigError(f"route() was given {found}; it must be a mapping, {{'math': [function]}}.")
    given: Mapping[str, Any] = functions
    for name, chosen in given.items():
        if callable(chosen):
            raise ConfigError(f"Domain {name!r} has a function, no list. Write {{{name!r}: [function]}}.")
        if chosen is not None and (isinstance(chosen, str) or not isinstance(chosen, Sequence)):
            raise ConfigError(
                f"Domain {name!r} has {str(chosen)[:60]!r} of type {type(chosen).__name__} as its rewards; it "
                f"must be a list of functions, {{{name!r}: [function]}}."
            )
    bare = [name for name, chosen in given.items() if not chosen]
    if bare:
        raise ConfigError(
            f"The domains {bare} have no reward function; there are {list(functions)}. Give each at least one."
        )
    return [for_domain(function, name, column) for name, chosen in functions.items() for function in chosen]


def for_domain(function: RewardFunction, domain: str, column: str = "domain") -> RewardFunction:
    """A reward function that scores only one domain's rows and returns None for all others.

    TRL leaves None out of sums and means. The function's metrics are named after the domain, and so are columns
    that it logs with ``log_extra``. A function defined with ``async def`` stays one.

    Args:
        function: Called with the columns of the domain's rows alone.
        domain: The domain.
        column: The column that holds a row's domain.

    Raises:
        ConfigError: If it is a reward model, or the name of one, or the domain's name is no non-empty string.
    """
    if not named(domain):
        raise ConfigError(f"A reward function is of domain {domain!r}; it must be a name, a non-empty string.")
    if not callable(function) or isinstance(function, torch.nn.Module):
        raise ConfigError(
            f"Domain {domain!r} has {type(function).__name__} {str(function)[:40]!r} as a reward; it must be a "
            "function. Wrap a reward model in one, or give it to the trainer beside what route() returns."
        )
    share = _Share(domain, column, getattr(function, "__name__", type(function).__name__))
    scored: RewardFunction
    # Of an object that is called it is its class that says whether it is async.
    if any(inspect.iscoroutinefunction(item) for item in (function, type(function).__call__)):

        @wraps(function)
        async def scored(prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
            mine, arguments = share.take(prompts, completions, columns)
            found = await function(**arguments) if mine else []
            return share.spread(mine, found, len(completions), columns)

    else:

        @wraps(function)
        def scored(prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
            mine, arguments = share.take(prompts, completions, columns)
            found = function(**arguments) if mine else []
            return share.spread(mine, found, len(completions), columns)

    # On the function itself: wrappers that are made with `functools.wraps` have it too.
    vars(scored)[READS] = column
    scored.__name__ = f"{domain}_{getattr(function, '__name__', 'reward')}"
    return scored


def without(functions: Sequence[Any], column: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows for reward functions of which some cannot be given a column by its name; as they are if all can.

    Raises:
        ConfigError: If another one is by domain, and needs it.
    """
    strict = [function for function in functions if not _takes(function, column)]
    if not strict:
        return rows
    if any(getattr(function, READS, None) == column for function in functions):
        name = getattr(strict[0], "__name__", type(strict[0]).__name__)
        raise ConfigError(
            f"The reward function {name!r} takes no argument {column!r}, and stands beside functions by domain, "
            "which need that column of the rows. Give it **columns, or route it too."
        )
    return [{key: value for key, value in row.items() if key != column} for row in rows]


def _takes(function: Any, column: str) -> bool:
    if isinstance(function, torch.nn.Module) or getattr(function, READS, None) == column:
        # A reward model is handed no column.
        return True
    # Of the function inside of wrappers: they hand on what they are given.
    arguments = inspect.signature(function).parameters
    return column in arguments or any(item.kind is item.VAR_KEYWORD for item in arguments.values())


class _Share:
    """What of a batch one domain's reward function sees, and how its answers meet the whole batch."""

    def __init__(self, domain: str, column: str, function: str) -> None:
        self.domain, self.column, self.function = domain, column, function
        # Of the trainer's table of completions: a column that is there must be filled for every batch.
        self._logged: set[str] = set()
        self._filled: set[str] = set()

    def take(
        self, prompts: list[Any], completions: list[Any], columns: Mapping[str, Any]
    ) -> tuple[list[int], dict[str, Any]]:
        """Places of the domain's rows, and their columns."""
        count = len(completions)
        if self.column not in columns:
            raise ConfigError(
                f"The rows have no column {self.column!r}, by which it is told that they are of domain "
                f"{self.domain!r}; they have {sorted(columns)}. Name it with route(..., column=...), add it "
                "to the rows for evaluation too, and keep it (remove_unused_columns=False)."
            )
        mine = [index for index, name in enumerate(columns[self.column]) if name == self.domain]
        every = {"prompts": prompts, "completions": completions, **columns}
        chosen = {
            name: [values[index] for index in mine]
            if isinstance(values, list) and len(values) == count
            else values
            for name, values in every.items()
        }
        self._filled = set()
        if callable(log := columns.get("log_extra")):
            chosen["log_extra"] = partial(self._log, log, mine, count)
        return mine, chosen

    def spread(self, mine: list[int], found: Any, count: int, columns: Mapping[str, Any]) -> list[Any]:
        """The answers at their places, None elsewhere.

        Raises:
            ConfigError: If there is not one for each row.
        """
        rewards = self._each(found, len(mine), "returned", "rewards", "Return a number or None")
        if callable(log := columns.get("log_extra")):
            for name in sorted(self._logged - self._filled):
                log(name, [None] * count)
        return _at(mine, rewards, count)

    def _log(
        self, log: Callable[..., None], mine: list[int], count: int, column: str, values: Sequence[Any]
    ) -> None:
        logged = self._each(values, len(mine), f"logged in {column!r}", "values", "Log a value")
        name = f"{self.domain}_{column}"
        self._logged.add(name)
        self._filled.add(name)
        log(name, _at(mine, logged, count))

    def _each(self, values: Any, rows: int, did: str, what: str, do: str) -> list[Any]:
        try:
            several = iter(values)
        except TypeError:
            found = repr(values)[:60]
        else:
            made = list(several)
            if len(made) == rows:
                return made
            found = f"{len(made)} {what}"
        raise ConfigError(
            f"Reward function {self.function!r} of domain {self.domain!r} {did} {found}; of this batch it was "
            f"given the {rows} completions of its domain, so it must be {rows} {what}. {do} for each."
        )


def _at(places: list[int], values: Sequence[Any], count: int) -> list[Any]:
    full: list[Any] = [None] * count
    for index, value in zip(places, values, strict=True):
        full[index] = value
    return full
