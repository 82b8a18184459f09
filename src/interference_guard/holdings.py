"""Whether the files that a rank reads hold all the completions that are to be its own.

Ranks with rows of their own save what they keep. Where others go on, each must read the files of all of them:
with its own alone, the rows of ranks that are no more would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from .errors import StateError

if TYPE_CHECKING:
    from .guard import Guard

ADVICE = (
    "Name the folders of all ranks that saved, so that their rows are shared out anew: guard.load(folder, "
    "ranks=[...], place=(rank, ranks)). With as many ranks as before, give each its own folder and the place "
    "that it gave to guard.save()."
)


def check_own(guard: Guard, details: Mapping[str, Any], place: tuple[int, int] | None, source: object) -> None:
    """Check that a state which is read alone was saved by this rank, of as many as there are now.

    Args:
        guard: The guard it is for.
        details: Of the state.
        place: This rank and their number, among those that keep completions; None where the caller does not say.
        source: What messages call the state.

    Raises:
        StateError: If it is one of several ranks' and this is not that rank, or one of another number. Where
            neither its rank nor this one is named, nothing can be told.
    """
    number = _number(details)
    if not details.get("dealt") or number == 1:
        return
    saved = details.get("place")
    if saved is None and details.get("folders", 1) == 1:
        # Each part of the model keeps rows, and this one is of the part that lies here.
        saved = details.get("shards", [0, 1])
        place = place or tuple(saved)
    now = place or _known()
    if now[1] != number or (saved is not None and now[0] != saved[0]):
        rank = "one" if saved is None else f"rank {saved[0]}"
        raise StateError(
            f"{source} holds the completions of {rank} of {number}, and this is rank {now[0]} of {now[1]}. "
            + ADVICE
        )


def check_all(details: Sequence[Mapping[str, Any]], source: object) -> None:
    """Check that states which are read together are those of all ranks that keep completions.

    Args:
        details: Of the states.
        source: What messages call them.

    Raises:
        StateError: If some are missing.
    """
    first = details[0]
    if not first.get("dealt"):
        return
    number, places = _number(first), [item.get("place") for item in details]
    known = {place[0] for place in places if place is not None}
    missing = sorted(set(range(number)) - known) if None not in places else []
    if missing or len(details) < first.get("folders", 1):
        found = f"{len(details)} states" if None in places else f"ranks {sorted(known)}"
        raise StateError(f"{source} holds the completions of {found} of {number}. {ADVICE}")


def _number(details: Mapping[str, Any]) -> int:
    """How many ranks, or groups of ranks with the same rows, kept completions of their own."""
    place = details.get("place")
    return int(
        place[1] if place is not None else max(details.get("folders", 1), details.get("shards", [0, 1])[1])
    )


def _known() -> tuple[int, int]:
    """This rank and the number of all."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)
