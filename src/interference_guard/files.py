"""Names of the files the guard writes beside a trainer's own, also while it does, and what tells a whole one."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from pathlib import Path

TENSORS = "interference_guard.safetensors"
DETAILS = "interference_guard.json"
HISTORY = "interference_guard_history.jsonl"
# Of a sharded model every rank has a pair.
STATE = re.compile(r"interference_guard(_rank\d+)?\.(safetensors|json)")


def beside(path: Path) -> Path:
    """Where to write what then takes a path's place; other processes and threads may do the same."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()
