"""Which lines of a history go when it has grown too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Line = Mapping[str, Any]
Key = tuple[tuple[str, ...], tuple[str, ...]]


def active_of(line: Line) -> tuple[str, ...]:
    """Domains that the line's step trained; empty where the line does not say.

    >>> active_of({"active": ["math"]}), active_of({})
    (('math',), ())
    """
    return tuple(map(str, line.get("active") or ()))


def key_of(line: Line) -> Key:
    """What a line is about: the domains it trained, and those it evaluated."""
    return active_of(line), _evaluated(line)


def edges(lines: Sequence[Line]) -> set[int]:
    """Places of the lines on both sides of each change of the trained domains.

    Of evaluations also the first and the last one: accuracy before the first phase and at the end is read from
    them. Evaluations of other domains are lines of their own, with edges of their own.

    >>> sorted(edges([{"active": [name]} for name in "aaabb"]))
    [2, 3]
    """
    places: dict[tuple[str, ...], list[int]] = {}
    for place, line in enumerate(lines):
        places.setdefault(_evaluated(line), []).append(place)
    found: set[int] = set()
    for evaluated, own in places.items():
        for before, after in pairwise(own):
            if active_of(lines[before]) != active_of(lines[after]):
                found |= {before, after}
        if evaluated:
            found |= {own[0], own[-1]}
    return found


def has_phases(lines: Sequence[Line]) -> bool:
    """Whether the domains change so seldom that the edges are at most half of the lines.

    >>> [has_phases([{"active": name} for name in order]) for order in ("aaaabbbb", "abababab")]
    [True, False]
    """
    return 2 * len(edges(lines)) <= len(lines)


def halved(lines: Sequence[Line]) -> list[Line]:
    """About half of the lines, the newest among them.

    Edges stay where there are phases. Of two neighbours the one goes whose domains have more lines: every second
    line of domains that take turns would always be the same domain's.

    Args:
        lines: Lines of one kind in their order.

    >>> [line["step"] for line in halved([{"step": step} for step in range(1, 9)])]
    [2, 4, 6, 8]
    >>> "".join(line["active"] for line in halved([{"active": name} for name in "abababab"]))
    'abab'
    """
    kept = edges(lines) if has_phases(lines) else set()
    counts = Counter(key_of(lines[place]) for place in kept)
    rest = [place for place in reversed(range(len(lines))) if place not in kept]
    # The newest line stays, and the next one is written a whole stride after it.
    for pair in (rest[:1], *zip(rest[1::2], rest[2::2], strict=False)):
        if pair:
            place = min(reversed(pair), key=lambda place: counts[key_of(lines[place])])
            kept.add(place)
            counts[key_of(lines[place])] += 1
    return [lines[place] for place in sorted(kept)]


def _evaluated(line: Line) -> tuple[str, ...]:
    return tuple(sorted(line.get("rewards") or ()))
