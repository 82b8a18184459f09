"""Names of what the guard writes beside a trainer's own, also while it does, and what tells a whole file."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import StateError

TENSORS = "interference_guard.safetensors"
DETAILS = "interference_guard.json"
HISTORY = "interference_guard_history.jsonl"
# Of a sharded model every rank has a pair.
STATE = re.compile(r"interference_guard(_rank\d+)?\.(safetensors|json)")
REPORT = "report.html"
CARD = "README.md"
# Around the guard's section in a trainer's model card.
SECTION_BEGIN, SECTION_END = "<!-- interference_guard -->", "<!-- /interference_guard -->"


def beside(path: Path) -> Path:
    """Where to write what then takes a path's place; other processes and threads may do the same."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to inside of the block, which then takes the place of `path`: whole, or not at all."""
    new = beside(path)
    try:
        yield new
        os.replace(new, path)
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()


def check_digest(path: Path, details: Mapping[str, Any], advice: str) -> None:
    """Check that a tensor file is the one that its details were written with.

    Args:
        path: The tensor file.
        details: Name its size and its digest.
        advice: What to do where it is not.

    Raises:
        StateError: If it is another one, or was cut off.
    """
    size = path.stat().st_size
    if size != details.get("tensor_bytes") or digest(path) != details.get("tensor_sha256"):
        raise StateError(
            f"{path} is damaged: it has {size} bytes where {details.get('tensor_bytes')} with a known digest "
            f"were written. {advice}"
        )


def without_section(card: str) -> str:
    r"""A model card's text without the guard's section; as it is where there is none.

    Examples:
        >>> without_section(f"Toy\n\n{SECTION_BEGIN}\n| math | 1 |\n{SECTION_END}\n")
        'Toy\n'
    """
    before, begin, rest = card.partition(SECTION_BEGIN)
    _, end, after = rest.partition(SECTION_END)
    return before.rstrip() + after if begin and end else card
