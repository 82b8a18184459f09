"""Takes a state over on all ranks or on none.

A rank that goes on from another moment than the others, or that could not read its part, would leave them waiting
in a sum over ranks.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import StateError
from .moment import COUNTS, NUMBERS, differ, trained

if TYPE_CHECKING:
    from .guard import Guard


@dataclass(frozen=True)
class Ready:
    """A state that was read and checked.

    Args:
        details: What its file says.
        take: Takes it over.
    """

    details: Mapping[str, Any]
    take: Callable[[], None]

    @property
    def save_id(self) -> str | None:
        """What it was written with, see `checkpoint.write`."""
        found: str | None = self.details.get("save_id")
        return found


def take_together(guard: Guard, read: Callable[[], Ready]) -> Ready:
    """Read a state and take it over; with a reduction over ranks all of them call it, and all or none do.

    Args:
        guard: The guard to fill; unchanged where any rank raises.
        read: Reads this rank's part.

    Raises:
        StateError: On all ranks, if they read states of different moments, or any could not read its own.
    """
    ready: Ready | None = None
    try:
        ready = read()
    finally:
        # Also where it raised: the others wait to hear of it.
        _compare(guard, ready)
    ready.take()
    return ready


def _compare(guard: Guard, ready: Ready | None) -> None:
    """Raise where another rank could read no state, or read one of another moment; all ranks call it."""
    own = [math.nan] * 2 if ready is None else [float(ready.details["steps"]), _structure(ready.details)]
    (_, failed), steps, structure = _extremes(guard, [float(ready is None), *own])
    if ready is None:
        return
    if failed:
        raise StateError(
            "Another rank could not read its part of the state, and its own error says why. No rank has taken "
            "anything over."
        )
    what = f"They are at steps {steps[0]:.0f} to {steps[1]:.0f}" if steps[0] < steps[1] else ""
    if not what and structure[0] < structure[1]:
        what = f"At step {steps[0]:.0f} they are of several attempts, or of domains that were counted otherwise"
    if what:
        raise StateError(_moments(what))
    tables: Mapping[str, Mapping[str, float]] = ready.details.get("shared") or {}
    keys = [(name, key) for name in sorted(trained(ready.details)) for key in NUMBERS if tables]
    numbers = [tables[name].get(key, math.nan) for name, key in keys]
    found = dict(zip(keys, _extremes(guard, numbers), strict=True))
    for (name, key), span in found.items():
        if differ(span, found[name, "radius"] if key == "subspace" else ()):
            raise StateError(
                _moments(f"They are of several attempts: {key} of domain {name!r} is from {span[0]} to {span[1]}")
            )


def _moments(what: str) -> str:
    return (
        f"The ranks read states of different moments. {what}. No rank has taken anything over. Give every rank "
        "its file of one and the same checkpoint."
    )


def _structure(details: Mapping[str, Any]) -> float:
    """A number that ranks share which read files of one moment: of all that is the same to the bit."""
    counts = {name: [details["domains"][name][key] for key in COUNTS] for name in trained(details)}
    told = [details.get("save_id"), details.get("shared") is None, counts]
    return float(zlib.crc32(json.dumps(told, sort_keys=True).encode()))


def _extremes(guard: Guard, values: Sequence[float]) -> list[tuple[float, float]]:
    """Smallest and largest of each number over ranks, of those that are finite."""
    limits = [limit for value in values for limit in _limits(value)]
    found = guard.ranks.largest(limits, guard.device) if limits else []
    return [(-negative, highest) for negative, highest in zip(found[::2], found[1::2], strict=True)]


def _limits(value: float) -> tuple[float, float]:
    return (-value, value) if math.isfinite(value) else (-math.inf, -math.inf)
