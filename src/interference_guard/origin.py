"""What a saved state says of where it is from, compared with the guard it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .checks import difference
from .errors import StateError, StateVersionError

if TYPE_CHECKING:
    from .guard import Guard

VERSION = 9
# Settings that give the saved tensors their meaning; the others may change between runs.
BINDING = ("rank", "sketch", "residual", "seed", "coverage", "selection", "unit_overrides")


def check(guard: Guard, details: Mapping[str, Any], source: str) -> None:
    """Check that a state is of this format, these settings and this model; `source` is what messages call it.

    Raises:
        StateError: If it is not.
        StateVersionError: If its format is another one.
    """
    if details.get("format") != "interference_guard":
        raise StateError(f"{source} was not written by interference_guard. Point to a guard's state file.")
    if details.get("version") != VERSION:
        raise StateVersionError(
            f"{source} has format version {details.get('version')!r}; this version reads {VERSION}. "
            "Use the release of interference-guard that wrote it, or start a new guard."
        )
    settings, saved = details.get("settings"), details.get("parameters")
    if not isinstance(settings, dict) or not isinstance(saved, dict):
        raise StateError(f"{source} is damaged: it names no settings or no parameters. Use another one.")
    shards = details.get("shards", [0, 1])
    if not (isinstance(shards, list) and list(map(type, shards)) == [int, int]):
        raise StateError(f"{source} is damaged: its rank and their number are {shards!r}. Use another one.")
    place, folders = details.get("place"), details.get("folders", 1)
    known = place is None or (isinstance(place, list) and list(map(type, place)) == [int, int])
    if not known or type(folders) is not int:
        raise StateError(
            f"{source} is damaged: it is of rank {place!r} and {folders!r} folders. Use another one."
        )
    for name in ("weights", "pieces"):
        sums = details.get(name)
        if sums is not None and not (isinstance(sums, dict) and all(isinstance(v, str) for v in sums.values())):
            raise StateError(f"{source} is damaged: its {name} are no checksums. Use another one.")
    for name in BINDING:
        if settings.get(name) != getattr(guard.config, name):
            raise StateError(
                f"{source} was made with {name}={settings.get(name)!r}, this guard has "
                f"{name}={getattr(guard.config, name)!r}. Use the same value; budgets and step counts may "
                "change, these may not: " + ", ".join(BINDING) + "."
            )
    own = parameters_of(guard)
    if saved != own:
        found = difference(saved, own, ("there", "here"))
        raise StateError(f"{source} is of another model: {found}. Load it into the model it was saved with.")


def check_shards(guard: Guard, details: Mapping[str, Any], source: str) -> None:
    """Check that a state is this rank's part; raises `StateError` if it is not."""
    saved, own = details.get("shards", [0, 1]), shards_of(guard)
    if saved != own:
        raise StateError(
            f"{source} is rank {saved[0]} of {saved[1]} of a sharded model, this is rank {own[0]} of {own[1]}. "
            "Each rank has a part of its own: give it that, or read the files of all ranks with Guard.load()."
        )


def parameters_of(guard: Guard) -> dict[str, list[int]]:
    """Shapes of the guarded parameters by canonical name."""
    return {view.name: list(view.shape) for block in guard.view.blocks for view in block.views}


def shards_of(guard: Guard) -> list[int]:
    """This rank and the number of ranks the model is sharded over."""
    return [guard.view.shards.rank, guard.view.shards.world]


def blocks_of(guard: Guard) -> list[list[str]]:
    """The guarded parameters by canonical name, in the order and the groups in which tensors are of them."""
    return [[view.name for view in block.views] for block in guard.view.blocks]


def same_blocks(guard: Guard, details: Mapping[str, Any]) -> bool:
    """Whether a state's tensors are of the same parameters, one by one, as the guard's."""
    saved, own = details.get("blocks"), blocks_of(guard)
    return saved is None or saved == own


def check_blocks(guard: Guard, details: Mapping[str, Any], source: str) -> None:
    """Check that a state's tensors are in the guard's order and groups; raises `StateError` if they are not."""
    if same_blocks(guard, details):
        return
    saved, own = details["blocks"], blocks_of(guard)
    number = next((index for index, (a, b) in enumerate(zip(saved, own, strict=False)) if a != b), len(own))
    there, here = ((blocks[number] if number < len(blocks) else []) for blocks in (saved, own))
    raise StateError(
        f"{source} stacks the parameters in another order, or in other groups: its block {number} is of {there}, "
        f"this guard's of {here}. One rank's part of a sharded model cannot be put in order by itself: read the "
        "files of all ranks with Guard.load(), or register the parameters in the order, and have them in the "
        "formats, they were saved in."
    )
