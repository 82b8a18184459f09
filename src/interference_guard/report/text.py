"""Names as they may be shown: a domain may be called anything."""

from __future__ import annotations

from typing import Any


def plain(name: Any) -> str:
    """A name without characters that move the cursor, end the line or cannot stand in a file of XML.

    >>> plain("ma" + chr(27) + "th" + chr(10))
    'ma th '
    """
    return "".join(letter if letter.isprintable() else " " for letter in str(name))
