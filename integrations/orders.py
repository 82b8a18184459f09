"""The orders of domains that every host knows by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ORDERS = ("sequential", "round_robin")


def planned(order: str, names: Sequence[str], counts: Mapping[str, int]) -> list[str]:
    """The domain of each batch.

    Args:
        order: ``"round_robin"``: a batch of each in turn, as long as it has any; else one domain after the other.
        names: Domains in the order in which they are trained.
        counts: Batches of each.

    >>> planned("sequential", ["math", "code"], {"math": 2, "code": 1})
    ['math', 'math', 'code']
    >>> planned("round_robin", ["math", "code"], {"math": 2, "code": 1})
    ['math', 'code', 'math']
    """
    if order == "round_robin":
        return [name for turn in range(max(counts.values())) for name in names if turn < counts[name]]
    return [name for name in names for _ in range(counts[name])]
