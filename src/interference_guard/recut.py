"""Turns the saved parts of one number of ranks into those of another.

What ranks keep are parts of sums, so the whole is their sum, taken parameter by parameter (ranks of another
number may stack parameters into other blocks). Of a whole, each new rank takes the units that lie there. A unit
that is cut has no part of its own in the whole any more: the first rank takes all of it and the others start
from zero, which adds up to the same. Retained completions are dealt anew, in the order of the former ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .blocks import block_shape
from .domain import MEANS
from .local_block import LocalBlock
from .local_model import LocalModel
from .model_view import ModelView
from .moment import check_moment
from .origin import blocks_of, check, check_blocks, check_shards, parameters_of, same_blocks
from .packing import ROWS, pack, parts_of, state_errors, unpacked
from .regions import Region
from .shards import Shards

if TYPE_CHECKING:
    from .guard import Guard

Part = tuple[Mapping[str, Any], Mapping[str, Tensor]]
"""Details and tensors that one rank saved."""
Get = Callable[[str], Tensor | None]


@state_errors()
def recut(guard: Guard, parts: Sequence[Part], place: tuple[int, int]) -> Part:
    """The part of this rank, from those of all ranks of another run.

    Args:
        guard: The guard it is for.
        parts: Of all ranks, in their order.
        place: Which share of the completions this rank takes, and of how many; without a reduction all ranks see
            all rows, and each keeps them all.

    Returns:
        Details and tensors as this rank would have saved them.

    Raises:
        StateError: If the parts are not those of one moment of one run, or do not fit each other.
    """
    # Of a running guard they may lie on a device.
    parts = [(details, {name: tensor.cpu() for name, tensor in tensors.items()}) for details, tensors in parts]
    cutters = _cutters(guard, parts)
    place = place if guard.ranks.reduce is not None else (0, 1)
    keepers = _keepers([details for details, _ in parts])
    # Rows of a domain that no step was announced of may have come to some ranks alone.
    names = [name for name in parts[0][0]["domains"] if all(name in details["domains"] for details, _ in parts)]
    tensors: dict[str, Tensor] = {}
    domains: dict[str, Any] = {}
    for number, name in enumerate(names):
        saved = [details["domains"][name] for details, _ in parts]
        getters = [_getter(part, name) for part in parts]
        wholes = _whole(guard, cutters, getters)
        found = dict(_cut(guard, wholes))
        for key in ("count", "radius", "subspace", "energy", "gradient/count", "noise"):
            if (tensor := getters[0](key)) is not None:
                found.setdefault(key, tensor)
        prefix = _prefix(parts[0], name)
        for key, tensor in parts[0][1].items():
            if key.startswith((f"{prefix}half_set/", f"{prefix}protected_set/")):
                found[key.removeprefix(prefix)] = tensor
        kept = [saved[index] for index in keepers]
        domains[name] = _details(kept, place)
        domains[name]["pending"] = _deal(kept, [getters[index] for index in keepers], place, found)
        tensors |= {f"{number}/{key}": tensor for key, tensor in found.items()}
    shards = guard.view.shards
    now = {"shards": [shards.rank, shards.world], "blocks": blocks_of(guard), "cuts": shards.cuts}
    return {**parts[0][0], "domains": domains, **now}, tensors


def restored(guard: Guard, packed: Mapping[str, object]) -> Callable[[], None]:
    """Check what `pack` made, by the names of parameters where they are stacked in another way here.

    They are where the model registers them in another order, or has some of them in another format.

    Args:
        guard: Not changed.
        packed: Of a whole model, or this rank's part, whose parameters must be stacked as they were.

    Returns:
        What takes it over.

    Raises:
        StateError: If the state is of another model or of other settings, or incomplete.
        StateVersionError: If its format is unknown.
    """
    part: Part = parts_of(packed)
    details = part[0]
    check(guard, details, "The state")
    check_shards(guard, details, "The state")
    if guard.view.shards.sharded:
        check_blocks(guard, details, "The state")
    elif not same_blocks(guard, details):
        # Each process keeps the completions that it has.
        part = recut(guard, [part], (0, 1))
    return unpacked(guard, *part)


def share_out(guard: Guard, model: nn.Module) -> None:
    """Go on with a model whose parameters ranks now share, of which the guard knew the whole; all ranks call it.

    Each rank keeps the completions that it has.

    Args:
        guard: Its model was whole on this rank.
        model: The same model, sharded.
    """
    packed = pack(guard)
    before = guard.view
    guard.view = ModelView(model, guard.config)
    try:
        unpacked(guard, *recut(guard, [(packed["details"], packed["tensors"])], (0, 1)))()
    except BaseException:
        guard.view = before
        raise


# The parts as they were


def _cutters(guard: Guard, parts: Sequence[Part]) -> list[tuple[int, list[tuple[list[str], Region]]]]:
    """By former rank of the sharded model: which part holds it, and its blocks with their regions."""
    details = [item for item, _ in parts]
    ranks = [tuple(item["shards"]) for item in details]
    check_moment(details, complete=True)
    blocks = details[0]["blocks"]
    if sorted(name for names in blocks for name in names) != sorted(parameters_of(guard)):
        raise ValueError("its blocks are not those of its parameters")
    if any(item["blocks"] != blocks for item in details):
        raise ValueError("its ranks stack parameters in different ways")
    views = guard.view.layout.views
    cuts = {name: (view.shape, details[0]["cuts"].get(name)) for name, view in views.items()}
    found = []
    for rank in range(ranks[0][1]):
        shards = Shards.planned(cuts, rank, ranks[0][1])
        regions = [
            (names, shards.region([views[name] for name in names], block_shape([views[name] for name in names])))
            for names in blocks
        ]
        # Copies of one piece (hybrid sharding) are equal: the first one serves.
        found.append(([saved for saved, _ in ranks].index(rank), regions))
    return found


def _keepers(details: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which parts hold completions of their own: one of those that kept the same."""
    if not details[0]["dealt"]:
        return [0]
    places = [index if item["place"] is None else tuple(item["place"]) for index, item in enumerate(details)]
    return [places.index(place) for place in dict.fromkeys(places)]


def _prefix(part: Part, name: str) -> str:
    return f"{list(part[0]['domains']).index(name)}/"


def _getter(part: Part, name: str) -> Get:
    tensors, prefix = part[1], _prefix(part, name)
    return lambda key: tensors.get(prefix + key)


def _whole(
    guard: Guard, cutters: Sequence[tuple[int, Sequence[tuple[Sequence[str], Region]]]], getters: Sequence[Get]
) -> dict[str, dict[str, Tensor]]:
    """Everything about one domain that belongs to parameters, whole and by parameter."""
    wholes: dict[str, dict[str, Tensor]] = {}
    gets = [getters[place] for place, _ in cutters]
    moved, first = gets[0]("moved"), 0
    for index, (names, _) in enumerate(cutters[0][1]):
        regions = [blocks[index][1] for _, blocks in cutters]
        table = {
            "sketch": _added(gets, regions, f"sums/{index}/sketch", Region.spread_across),
            "sums": _added(gets, regions, f"sums/{index}/energy", Region.spread_units),
            "basis": gets[0](f"sums/{index}/basis"),
            "eigenvalues": gets[0](f"sums/{index}/eigenvalues"),
            "start": _added(gets, regions, f"start/{index}", Region.spread_units),
            # Products of cut units are whole on every rank.
            "gradient": gets[0](f"gradient/{index}")
            if regions[0].split
            else _added(gets, regions, f"gradient/{index}", Region.spread_units),
            **_model(index, regions, gets),
            # By matrix of all blocks, and the same on every rank.
            "moved": None if moved is None else moved[first : first + regions[0].shape[0]].unsqueeze(1),
        }
        first += regions[0].shape[0]
        if table["energy"] is None:
            # One process shares it with the sums.
            table["energy"] = table["sums"] if table["lam"] is not None else None
        for key, tensor in table.items():
            for name, piece in zip(names, () if tensor is None else tensor.chunk(len(names)), strict=False):
                wholes.setdefault(name, {})[key] = piece
    return wholes


def _added(
    gets: Sequence[Get], regions: Sequence[Region], key: str, spread: Callable[[Region, Tensor], Tensor]
) -> Tensor | None:
    """The sum of the ranks' pieces; None where they have none."""
    pieces = [piece for get in gets if (piece := get(key)) is not None]
    if len(pieces) < len(gets):
        return None
    return torch.stack([spread(region, piece) for region, piece in zip(regions, pieces, strict=True)]).sum(0)


def _model(index: int, regions: Sequence[Region], gets: Sequence[Get]) -> dict[str, Tensor | None]:
    """A block of the local model, whole; rows of units that are not protected are zero."""
    keys = ("U", "lam", "rho", "scale", "energy", "rows", "z0", "q0")
    first = {key: gets[0](f"model/{index}/{key}") for key in keys}
    lam, rows = first["lam"], first["rows"]
    basis, energy = gets[0](f"sums/{index}/basis"), gets[0](f"sums/{index}/energy")
    if lam is None or energy is None:
        return dict.fromkeys((*keys, "mask", "slopes"))
    if first["U"] is None and basis is not None:
        first["U"] = basis[:, :, : lam.shape[1]]
    matrices, units, _ = regions[0].shape
    chosen = torch.arange(matrices * units, device=lam.device) if rows is None else rows
    found: dict[str, Tensor | None] = {key: first[key] for key in ("U", "lam", "rho", "scale", "energy")}
    mask = torch.zeros(matrices * units, dtype=torch.bool, device=lam.device)
    mask[chosen] = True
    found["mask"] = mask.view(matrices, units)

    def dense(values: Tensor) -> Tensor:
        full = values.new_zeros(matrices * units, values.shape[-1])
        return full.index_copy_(0, chosen, values).view(matrices, units, -1)

    for key in ("z0", "q0"):
        total = lam.new_zeros(len(chosen), 1)
        for region, get in zip(regions, gets, strict=True):
            values = get(f"model/{index}/{key}")
            if values is None:
                raise KeyError(f"model/{index}/{key}")
            # Only the shape of the energy is read.
            block = LocalBlock(lam, lam, lam, lam, lam.new_empty(matrices, units), chosen, values, values, region)
            out = values.new_zeros(len(chosen), values.shape[-1])
            block.put(values, out)
            total = total + out
        found[key] = dense(total)
    slopes = gets[0](f"slopes/{index}")
    found["slopes"] = None if slopes is None else dense(slopes)
    return found


# The parts as they are now


def _cut(guard: Guard, wholes: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What of the wholes belongs to this rank, by the names under which it is saved."""
    spread, first = guard.view.spread, guard.view.shards.rank == 0
    models: list[LocalBlock] = []
    moved: list[Tensor] = []
    for index, block in enumerate(guard.view.blocks):
        members = [wholes.get(view.name, {}) for view in block.views]
        whole = {key: _stacked([member[key] for member in members]) for key in members[0]}
        region = block.region
        moved += [whole["moved"].flatten()] if "moved" in whole else []

        if "sums" in whole:
            yield f"sums/{index}/energy", region.own_units(whole["sums"], first)
        if "sketch" in whole:
            yield f"sums/{index}/sketch", region.own(whole["sketch"], first)
        for key in ("basis", "eigenvalues"):
            if key in whole:
                yield f"sums/{index}/{key}", whole[key]
        if "start" in whole:
            yield f"start/{index}", region.own_units(whole["start"], first)
        if "gradient" in whole:
            seen = whole["gradient"]
            yield f"gradient/{index}", seen if region.split else region.units(seen).clone()
        if "lam" not in whole:
            continue
        mask = whole["mask"].flatten()
        rows = None if bool(mask.all()) else mask.nonzero().flatten()
        parts = [whole[key] for key in ("U", "lam", "rho", "scale", "energy")]
        U, lam, rho, scale, energy = parts
        model = LocalBlock(U, lam, rho, scale, energy, rows, lam, lam)
        model.z0 = model.select(whole["z0"])
        models.append(model)
        for key, value in zip(("U", "lam", "rho", "scale", "energy"), parts, strict=True):
            yield f"model/{index}/{key}", value
        if rows is not None:
            yield f"model/{index}/rows", rows
        here = LocalBlock(U, lam, rho, scale, energy, rows, lam, lam, None if spread is None else region)
        for key in ("z0", "q0"):
            yield f"model/{index}/{key}", here.take(region.own_units(whole[key], first))
        if "slopes" in whole:
            yield f"slopes/{index}", model.select(whole["slopes"])
    if moved:
        yield "moved", torch.cat(moved)
    if models and spread is not None:
        yield "noise", LocalModel(models).rounding()


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Members of a block one after the other; those with fewer directions get zero columns."""
    width = max(tensor.shape[-1] for tensor in tensors)
    if all(tensor.shape[-1] == width for tensor in tensors):
        return torch.cat(list(tensors))
    return torch.cat([torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors])


# Completions and numbers


def _deal(
    saved: Sequence[Mapping[str, Any]], getters: Sequence[Get], place: tuple[int, int], found: dict[str, Tensor]
) -> int:
    """Deal the completions of all former ranks anew; returns how many batches wait for the next anchor."""
    if saved[0]["reference"]:
        # Every rank has the same rows of a domain that was given before the training.
        saved, getters, place = saved[:1], getters[:1], (0, 1)
    rank, world = place

    def deal(groups: Sequence[str | None], target: str) -> bool:
        pieces = [
            {key: tensor for key in ROWS if (tensor := get(f"completions/{group}/{key}")) is not None}
            for group, get in zip(groups, getters, strict=True)
            if group is not None
        ]
        pieces = [piece for piece in pieces if piece]
        if target == "retained" and saved[0]["measurable"]:
            scores = [tensor for get in getters if (tensor := get("anchor_scores")) is not None]
            for piece, values in zip(pieces, scores, strict=True):
                piece["scores"] = values
        # A rank whose batch had no rewards cannot be joined with others: its rows are left out.
        rewarded = [piece for piece in pieces if "rewards" in piece]
        pieces = rewarded or pieces
        kept = [key for key in (*ROWS, "scores") if pieces and all(key in piece for piece in pieces)]
        for key in kept:
            tensors = [piece[key] for piece in pieces]
            whole = torch.cat(tensors) if key == "rewards" else _stacked(tensors)
            chunk = math.ceil(len(whole) / world)
            mine = whole[rank * chunk : (rank + 1) * chunk].clone()
            if len(mine):
                found["anchor_scores" if key == "scores" else f"completions/{target}/{key}"] = mine
        return f"completions/{target}/input_ids" in found

    deal(["retained"] * len(saved), "retained")
    dealt = 0
    # Ranks without rows of a domain in some batch have fewer of them: the newest are of one time.
    for age in range(max(item["pending"] for item in saved), 0, -1):
        groups = [str(item["pending"] - age) if item["pending"] >= age else None for item in saved]
        dealt += deal(groups, str(dealt))
    return dealt


def _details(saved: Sequence[Mapping[str, Any]], place: tuple[int, int]) -> dict[str, Any]:
    """Plain numbers: sums of former ranks are shared evenly, limits are those of all of them."""
    _, world = place
    lows = [item["low"] for item in saved if not math.isnan(item["low"])]
    highs = [item["high"] for item in saved if not math.isnan(item["high"])]
    longest = max(len(item["recent"]) for item in saved)
    recent = [[0.0, 0.0] for _ in range(longest)]
    for item in saved:
        for age, sums in enumerate(reversed(item["recent"]), 1):
            recent[-age] = [total + part / world for total, part in zip(recent[-age], sums, strict=True)]
    return {
        **saved[0],
        "low": min(lows, default=math.nan),
        "high": max(highs, default=math.nan),
        "recent": recent,
        **{
            name: [sum(values) / world for values in zip(*(item[name] for item in saved), strict=True)]
            for name in MEANS
        },
    }
