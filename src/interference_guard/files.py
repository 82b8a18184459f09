"""Names of the files the guard writes beside a trainer's own, and what tells whether one is whole."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

TENSORS = "interference_guard.safetensors"
DETAILS = "interference_guard.json"
HISTORY = "interference_guard_history.jsonl"
# Of a sharded model every rank has a pair.
STATE = re.compile(r"interference_guard(_rank\d+)?\.(safetensors|json)")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()
