"""What can be the name of a domain."""

from __future__ import annotations

from typing import TypeGuard


def named(name: object) -> TypeGuard[str]:
    """Whether a value names a domain: a string that is not empty."""
    return isinstance(name, str) and name != ""
