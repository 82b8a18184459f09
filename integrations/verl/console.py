"""Lines on the console of a run."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Write a line where veRL's own console logger writes."""
    sys.stdout.write(f"interference_guard: {line}\n")
    sys.stdout.flush()
