"""Whether the files of several ranks are of one moment of one run.

Attempts at the same steps know the same domains, and their files fit together. What tells them apart are
numbers that all ranks of a run share. They are compared up to rounding and not to the bit: groups of ranks that
each hold the whole model add up in orders of their own, and machines need not be alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .errors import StateError
from .packing import state_errors

if TYPE_CHECKING:
    from .domain import DomainState
    from .guard import Guard

# Part of itself by which a number may differ from rank to rank.
SAME = 1e-3
# What of a domain is counted alike on all ranks.
COUNTS = ("anchored", "own_steps", "foreign_steps", "renewed_at", "renewals")
# What is known of it alike up to rounding.
NUMBERS = ("energy", "curvature", "radius", "subspace")


def shared(guard: Guard) -> dict[str, dict[str, float]]:
    """By domain the numbers that all ranks share up to rounding, as far as they are known; reads the device."""
    return {name: _shared(state) for name, state in guard.domains.items() if state.own_steps or state.anchored}


def _shared(state: DomainState) -> dict[str, float]:
    tensors = {"energy": state.energy, "radius": state.radius, "subspace": state.subspace}
    if state.model is not None:
        tensors["curvature"] = torch.stack([block.lam.sum() for block in state.model.blocks]).sum()
    found = {key: tensor.item() for key, tensor in tensors.items() if tensor is not None}
    if not math.isfinite(found.get("radius", math.inf)):
        # Before the first visible step a displacement is nothing but rounding.
        found.pop("subspace", None)
    return found


def check_moment(details: Sequence[Mapping[str, Any]], *, complete: bool = False) -> None:
    """Refuse files that ranks did not write at one moment: one may have failed to write its own.

    Args:
        details: What the files say.
        complete: Whether those of every rank must be among them.

    Raises:
        StateError: If they are of several moments, attempts or runs, or one is missing.
    """
    ranks = [tuple(item.get("shards", (0, 1))) for item in details]
    # A damaged file may hold anything there.
    worlds, steps = {world for _, world in ranks}, _different([item.get("steps") for item in details])
    # A step that was trained a second time is of another moment.
    saves = _different([item.get("save_id") for item in details])
    missing = sorted(set(range(max(worlds))) - {rank for rank, _ in ranks}) if complete else []
    if len(worlds) > 1 or len(steps) > 1 or len(saves) > 1 or missing:
        attempts = f" of {len(saves)} attempts" if len(saves) > 1 else ""
        raise StateError(
            f"The guard's files are not those of all ranks at one moment: they are ranks {sorted(ranks)} at "
            f"steps {sorted(steps, key=str)}{attempts}, rank {missing or 'none'} is missing. Put the files of "
            "every rank of one checkpoint there, or resume with as many ranks as before."
        )
    with state_errors():
        names = [trained(item) for item in details]
        found = next(_apart(details, names[0]), "") if all(item == names[0] for item in names) else None
    if found is None:
        raise StateError(
            f"The guard's files know different domains, {sorted(map(sorted, names))}, so they are not of one "
            "run. Put the files of every rank of one checkpoint there."
        )
    if found:
        raise StateError(
            f"The guard's files are of several attempts at step {steps[0]}: {found} by rank, and it is the same "
            "on all ranks of a run. Put the files of every rank of one checkpoint there."
        )


def trained(details: Mapping[str, Any]) -> set[str]:
    """The domains that steps were made of, which all ranks know; rows of others may have come to some alone."""
    return {name for name, of in details["domains"].items() if of["own_steps"] or of["anchored"]}


def _apart(details: Sequence[Mapping[str, Any]], names: set[str]) -> Iterator[str]:
    """What of these domains differs from file to file, as text."""
    known = [item.get("shared") for item in details]
    if any(table is None for table in known) and any(table is not None for table in known):
        # One of before there were such numbers.
        yield f"what ranks share is told by {sum(table is not None for table in known)} of {len(known)} files"
    for name in sorted(names):
        for key in COUNTS:
            values = [item["domains"][name][key] for item in details]
            if len(_different(values)) > 1:
                yield f"{key} of domain {name!r} is {values}"
        tables = [table[name] for table in known if table is not None]
        found = {key: [float(table.get(key, math.nan)) for table in tables] for key in NUMBERS}
        for key, numbers in found.items():
            # Displacements may be small beside what rounding is a part of.
            if differ(numbers, found["radius"] if key == "subspace" else ()):
                yield f"{key} of domain {name!r} is {numbers}"


def differ(numbers: Sequence[float], beside: Sequence[float] = ()) -> bool:
    """Whether numbers differ by more than rounding, which is a part of the largest of them and those beside them.

    Numbers that are not finite say nothing.
    """
    known = [number for number in numbers if math.isfinite(number)]
    scale = max((abs(number) for number in (*known, *beside) if math.isfinite(number)), default=0.0)
    return bool(known) and max(known) - min(known) > SAME * scale


def _different(values: Sequence[object]) -> list[object]:
    """Each value once, also of such as have no hash."""
    return [value for index, value in enumerate(values) if value not in values[:index]]
