"""Names as they may be shown: a domain may be called anything."""

from __future__ import annotations

import unicodedata
from typing import Any

# Cells of the longest name that a figure shows whole.
CELLS = 24


def plain(name: Any) -> str:
    """A name without characters that move the cursor, end the line or cannot stand in a file of XML.

    >>> plain("ma" + chr(27) + "th" + chr(10))
    'ma th '
    """
    return "".join(letter if letter.isprintable() else " " for letter in str(name))


def shortened(name: Any, cells: int = CELLS) -> str:
    """A plain name of at most so many cells, its middle left out: paths differ at their ends.

    >>> shortened("allenai/ai2_arc/ARC-Challenge-train"), shortened("数学" * 9, 10)
    ('allenai/ai2…llenge-train', '数学…数学')
    """
    whole = plain(name)
    if width(whole) <= cells:
        return whole
    tail = _within(whole[::-1], cells // 2)[::-1]
    return _within(whole, cells - 1 - width(tail)) + "…" + tail


def width(name: str) -> int:
    """Cells of a name: letters of East Asia, and pictures, are twice as wide as others."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name)


def _within(name: str, cells: int) -> str:
    while width(name) > cells:
        name = name[:-1]
    return name
