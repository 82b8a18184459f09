"""Reward functions that score the rows of their own domain and leave the others alone."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from interference_guard.errors import ConfigError

RewardFunction = Callable[..., Sequence[float | None]]


def load(path: str) -> RewardFunction:
    """Import a reward function.

    Args:
        path: ``"package.module.function"``, or ``"folder/file.py:function"``.

    Raises:
        ConfigError: If there is no such module, file or function.
    """
    place, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None:
                raise ImportError(place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found: RewardFunction = getattr(module, name)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"Reward function {path!r} cannot be imported: {error}. Write 'package.module.function' or "
            "'folder/file.py:function'."
        ) from error
    return found


def route(functions: Mapping[str, Sequence[RewardFunction]], column: str = "domain") -> list[RewardFunction]:
    """Reward functions of several domains as one list for a trainer: each scores its own domain's rows.

    TRL logs every function apart, under the domain's name and its own.

    Args:
        functions: Reward functions by domain.
        column: The column that holds a row's domain.

    Raises:
        ConfigError: If a domain has none: its rows would all be without a reward. Or a function without a list.
    """
    single = sorted(name for name, chosen in functions.items() if callable(chosen))
    if single:
        raise ConfigError(f"Domain {single[0]!r} has a function, no list. Write {{{single[0]!r}: [function]}}.")
    bare = sorted(name for name, chosen in functions.items() if not chosen)
    if bare or not functions:
        raise ConfigError(
            f"The domains {bare} have no reward function; there are {sorted(functions)}. Give each at least one."
        )
    return [for_domain(function, name, column) for name, chosen in functions.items() for function in chosen]


def for_domain(function: RewardFunction, domain: str, column: str = "domain") -> RewardFunction:
    """A reward function that scores only one domain's rows and returns None for all others.

    TRL leaves None out of sums and means. The function's metrics are named after the domain.

    Args:
        function: Called with the columns of the domain's rows alone.
        domain: The domain.
        column: The column that holds a row's domain.
    """

    @wraps(function)
    def scored(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        mine = [index for index, name in enumerate(columns[column]) if name == domain]
        scores: list[float | None] = [None] * len(completions)
        if not mine:
            return scores
        chosen = {
            name: [values[index] for index in mine]
            if isinstance(values, list) and len(values) == len(completions)
            else values
            for name, values in columns.items()
        }
        found = function(
            prompts=[prompts[index] for index in mine],
            completions=[completions[index] for index in mine],
            **chosen,
        )
        for index, score in zip(mine, found, strict=True):
            scores[index] = score
        return scores

    scored.__name__ = f"{domain}_{getattr(function, '__name__', 'reward')}"
    return scored
