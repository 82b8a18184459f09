"""Rows of like length in one forward pass, which costs what its longest row does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .probe import Completions


def in_batches(
    rows: Completions, size: int, policy: Callable[[Completions], Tensor], tokens: float = math.inf
) -> Tensor:
    """Scores of rows, so many at a time.

    Args:
        rows: ``(rows, length)``, padded on either side.
        size: Most rows of one call. Where there are more, those of like length are scored together, the longest
            first, without the columns in which all of them are padded; else all are scored as they are.
        policy: Scores one batch, ``(rows, length)`` fp32.
        tokens: Most tokens of one call, padding included; a single row may have more.

    Returns:
        ``(rows, length)`` fp32; 0 where a row is not scored.
    """
    if len(rows) <= size and rows.input_ids.numel() <= tokens:
        return policy(rows)
    scores: Tensor | None = None
    for places, columns in _batches(rows.attention_mask, size, tokens):
        found = policy(rows.rows(places).columns(columns))
        if scores is None:
            scores = found.new_zeros(rows.input_ids.shape)
        scores[places, columns] = found
    assert scores is not None
    return scores


def extent(attention: Tensor) -> slice:
    """The columns between the first and the last that any row, ``(rows, length)``, has a token in."""
    first, last = _ends(attention)
    return slice(int(first.min()), int(last.max()))


def _batches(attention: Tensor, size: int, tokens: float) -> Iterator[tuple[Tensor, slice]]:
    """Places of the rows of each batch, ``(rows,)`` int64, and the columns that any of them has a token in."""
    first, last = _ends(attention)
    # Stable: rows of one length stay in their order.
    order = (last - first).argsort(descending=True, stable=True)
    begin, end = first[order].tolist(), last[order].tolist()
    start = 0
    while start < len(order):
        # Where padding lies on both sides, a batch has more columns than its longest row.
        stop, left, right = start + 1, begin[start], end[start]
        while stop < min(start + size, len(order)):
            left, right = min(left, begin[stop]), max(right, end[stop])
            if (stop + 1 - start) * (right - left) > tokens:
                break
            stop += 1
        places = order[start:stop]
        yield places, extent(attention[places])
        start = stop


def _ends(attention: Tensor) -> tuple[Tensor, Tensor]:
    """By row the column of the first token and the one after the last; all columns of a row without any."""
    tokens = (attention != 0).int()
    return tokens.argmax(1), attention.shape[1] - tokens.flip(1).argmax(1)
