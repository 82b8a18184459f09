"""A guard's state as plain numbers and named tensors, and back; knows no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from .blocks import Block
from .curvature import BlockSums
from .domain import MEANS, DomainState
from .errors import StateError
from .first_order import GradientMean
from .local_block import LocalBlock
from .local_model import LocalModel
from .means import RunningMean
from .origin import BINDING, VERSION, blocks_of, parameters_of, shards_of
from .probe import Completions, Measurement
from .protected import ProtectedSet
from .recovery import RecoverySchedule
from .trust_region import TrustRegion

if TYPE_CHECKING:
    from .guard import Guard

# Tensors of completions, by field.
ROWS = ("input_ids", "attention_mask", "completion_mask", "rewards")
PLAIN = (
    "anchored",
    "own_steps",
    "since_refresh",
    "mixed_steps",
    "foreign_steps",
    "renewed_at",
    "renewals",
    "low",
    "high",
    "anchor_reward",
    "evaluated",
    "measurable",
    "temperature",
    "kept_at",
    "true_reward",
    "recent",
    "target_reward",
    "retained_reward",
    "scored_at",
    "reference",
    "fresh",
    "interrupted",
    "rewarded",
)


# A measurement, for what kind of value each of its fields is.
NOTHING = asdict(Measurement("", 0.0, 0.0, 0.0, "sequence"))
# Errors raised when a saved field is missing or has the wrong type, or a tensor does not fit the others.
BROKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


# torch.distributed.checkpoint keeps one rank's of what ranks call alike, and reads what a new guard has, which is
# no domain. It refuses two paths that come to one name, when it saves and before it reads, and shows that name.
_ADVICE = {"checkpoint holds no guard, call its save() and load() instead": ""}
REFUSAL: dict[str, object] = {"torch.distributed": _ADVICE, "torch": {"distributed": _ADVICE}}


class Packed(TypedDict):
    """A guard's state: what JSON can hold, and tensors by name."""

    details: dict[str, Any]
    tensors: dict[str, Tensor]


def pack(guard: Guard, folders: int = 1, place: tuple[int, int] | None = None) -> Packed:
    """A guard's state as ``{"details": JSON-ready, "tensors": {name: Tensor}}``; tensors are shared.

    Args:
        guard: The guard.
        folders: How many folders all ranks save into.
        place: This rank and their number, among those that keep completions of their own; by default every rank
            that saves does.
    """
    tensors: dict[str, Tensor] = {}
    domains: dict[str, Any] = {}
    for number, (name, state) in enumerate(guard.domains.items()):
        domains[name] = _pack_domain(state, f"{number}/", tensors)
    details = {
        "format": "interference_guard",
        "version": VERSION,
        "steps": guard.steps,
        "recovery": guard.schedule.state(),
        # Steps that the schedule has seen and what was measured since, where a run stops within one batch of
        # rollouts; and the domains of the last step.
        "followed": guard.followed,
        "unfollowed": sorted(guard.unfollowed),
        "asked": guard.asked,
        "announced": sorted(guard.announced),
        "trained": list(guard.trained),
        # What is not yet reported.
        "kept": guard.kept.sums(),
        "fruitless": dict(guard.fruitless),
        "differentiates": guard.differentiates,
        "settings": {name: getattr(guard.config, name) for name in BINDING},
        "parameters": parameters_of(guard),
        # For readers without the model: which layers are stored transposed cannot be seen from shapes.
        "transposed": sorted(guard.view.layout.transposed),
        "shards": shards_of(guard),
        "blocks": blocks_of(guard),
        "cuts": guard.view.shards.cuts,
        # Whether the ranks keep different completions.
        "dealt": guard.ranks.reduce is not None,
        "folders": folders,
        "place": None if place is None else list(place),
        "domains": domains,
    }
    return {"details": details, "tensors": tensors}


def unpacked(guard: Guard, details: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """Check a state of this model and its blocks, see `recut.restored`; nothing is changed.

    Returns:
        What takes it over.

    Raises:
        StateError: If it is incomplete, or something in it is of another kind than what belongs there.
    """
    with state_errors():
        domains = {
            name: _unpack_domain(guard, name, f"{number}/", item, tensors)
            for number, (name, item) in enumerate(details["domains"].items())
        }
        steps = int(details["steps"])
        given = dict(details["recovery"])
        schedule = RecoverySchedule(domain=given.pop("domain", None), **_table(given, RecoverySchedule().state()))
        if schedule.domain not in (None, *domains):
            raise ValueError(f"its recovery is of {schedule.domain!r}, and its domains are {list(domains)}")
        followed = int(details["followed"])
        unfollowed = {name: found for name in details["unfollowed"] if (found := domains[name].measurement)}
        trained, announced = (tuple(_words(key, details[key])) for key in ("trained", "announced"))
        asked, differentiates = int(details["asked"]), bool(details["differentiates"])
        total, count = details["kept"]
        kept = RunningMean(_plain("kept", total, 0.0), _plain("kept", count, 0.0))
        fruitless: Counter[str] = Counter(
            {name: int(_plain("fruitless", count, 0)) for name, count in details["fruitless"].items()}
        )

    def take() -> None:
        guard.replace_domains(domains, steps, schedule, announced)
        guard.followed, guard.unfollowed, guard.trained = followed, unfollowed, trained
        guard.asked, guard.differentiates = asked, differentiates
        guard.kept, guard.fruitless = kept, fruitless

    return take


def parts_of(packed: Mapping[str, object]) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Details and tensors of a state; raises `StateError` for what is none."""
    known = packed if isinstance(packed, Mapping) else {}
    details, tensors = known.get("details"), known.get("tensors")
    if not isinstance(details, dict) or not isinstance(tensors, Mapping):
        raise StateError("The state has no 'details' and 'tensors'; it must be what Guard.state_dict() returned.")
    return details, tensors


@contextmanager
def state_errors() -> Iterator[None]:
    """Raise `StateError` for what goes wrong inside because a state lacks a part, or a part does not fit."""
    try:
        yield
    except (StateError, torch.OutOfMemoryError):
        raise
    except BROKEN as error:
        raise StateError(
            f"The state is incomplete: {type(error).__name__}: {error}. Use one that Guard.save() finished."
        ) from error


def _pack_domain(state: DomainState, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    def put(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            tensors[prefix + name] = tensor

    details: dict[str, Any] = {name: getattr(state, name) for name in PLAIN}
    details["region"] = state.region.state()
    details |= {name: list(getattr(state, name).sums()) for name in MEANS}
    details["measurement"] = None if state.measurement is None else asdict(state.measurement)
    put("count", state.curvature.count)
    for index, sums in enumerate(state.curvature.sums):
        for name in ("sketch", "energy", "basis", "eigenvalues"):
            put(f"sums/{index}/{name}", getattr(sums, name))
    details["model"] = state.model is not None
    # In a single process it is computed again.
    put("noise", None if state.model is None or state.model.spread is None else state.model.noise)
    for index, block in enumerate(state.model.blocks if state.model is not None else ()):
        for name in ("lam", "rho", "scale", "rows", "z0", "q0"):
            put(f"model/{index}/{name}", getattr(block, name))
        # Fresh directions are the leading columns of the curvature's own basis and are stored once.
        if block.energy is not state.curvature.sums[index].energy:
            put(f"model/{index}/energy", block.energy)
        basis = state.curvature.sums[index].basis
        if basis is None or basis.untyped_storage().data_ptr() != block.U.untyped_storage().data_ptr():
            put(f"model/{index}/U", block.U)
    for group, rows in (("retained", state.retained), *enumerate(state.pending)):
        if rows is not None:
            for name in ROWS:
                put(f"completions/{group}/{name}", getattr(rows, name))
    details["pending"] = len(state.pending)
    details["pending_temperature"] = state.pending[-1].temperature if state.pending else 1.0
    for index, tensor in enumerate(state.start or ()):
        put(f"start/{index}", tensor)
    for index, tensor in enumerate(state.slopes or ()):
        put(f"slopes/{index}", tensor)
    if state.gradient is not None:
        put("gradient/count", state.gradient.count)
        for index, tensor in enumerate(state.gradient.sums):
            put(f"gradient/{index}", tensor)
    for name in ("anchor_scores", "radius", "subspace", "moved", "energy"):
        put(name, getattr(state, name))
    for name in ("protected_set", "half_set"):
        chosen = getattr(state, name)
        for key, mask in chosen.masks.items() if chosen is not None else ():
            put(f"{name}/{key}", mask)
    return details


def _unpack_domain(
    guard: Guard, name: str, prefix: str, details: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> DomainState:
    device = guard.device

    def get(key: str) -> Tensor | None:
        tensor = tensors.get(prefix + key)
        return None if tensor is None else tensor.to(device, copy=True)

    def need(key: str) -> Tensor:
        return tensors[prefix + key].to(device, copy=True)

    state = guard.new_state(name)
    for key in PLAIN:
        setattr(state, key, _plain(key, details[key], getattr(state, key)))
    for key in MEANS:
        getattr(state, key).add(*details[key])
    known = state.region.state()
    region = _table(details["region"], known) | {
        "budget": guard.config.budget,
        "budget_nats": guard.config.budget_nats,
    }
    state.region = TrustRegion(**region)
    if details["measurement"] is not None:
        state.measurement = Measurement(**_table(details["measurement"], NOTHING))
    state.curvature.count = need("count")
    if prefix + "sums/0/energy" in tensors:
        state.curvature.sums = [
            BlockSums(
                get(f"sums/{index}/sketch"),
                need(f"sums/{index}/energy"),
                get(f"sums/{index}/basis"),
                get(f"sums/{index}/eigenvalues"),
            )
            for index in range(len(guard.view.blocks))
        ]
    if details["model"]:
        blocks, spread = [], guard.view.spread
        for index, sums in enumerate(state.curvature.sums):
            parts = {key: need(f"model/{index}/{key}") for key in ("lam", "rho", "scale", "z0", "q0")}
            rows, U = get(f"model/{index}/rows"), get(f"model/{index}/U")
            if U is None:
                if sums.basis is None:
                    raise KeyError(f"{prefix}model/{index}/U")
                U = sums.basis[:, :, : parts["lam"].shape[1]]
            piece = None if spread is None else spread.regions[index]
            own = get(f"model/{index}/energy")
            energy = sums.energy if own is None else own
            blocks.append(LocalBlock(U=U, energy=energy, rows=rows, region=piece, **parts))
        state.model = LocalModel(blocks, spread, get("noise"))
    if state.anchored and state.model is None:
        raise ValueError(f"{name!r} has an anchor and no local model")
    state.retained = _completions("completions/retained", get, state.temperature)
    for index in range(details["pending"]):
        rows_of_batch = _completions(f"completions/{index}", get, details["pending_temperature"])
        if rows_of_batch is not None:
            state.pending.append(rows_of_batch)
    state.start = _listed("start", guard, get)
    # What was kept with another setting is let go.
    first_order = guard.config.first_order
    state.slopes = _listed("slopes", guard, get) if first_order else None
    count = get("gradient/count") if first_order else None
    if count is not None:
        sums_of_gradient = _listed("gradient", guard, get) or []
        state.gradient = GradientMean(guard.view.omegas, sums_of_gradient, count, guard.view.spread)
    for key in ("anchor_scores", "radius", "subspace", "moved", "energy"):
        setattr(state, key, get(key))
    for key in ("protected_set", "half_set"):
        masks = {
            view.name: tensors[f"{prefix}{key}/{view.name}"]
            for block in guard.view.blocks
            for view in block.views
            if f"{prefix}{key}/{view.name}" in tensors
        }
        setattr(state, key, ProtectedSet(masks) if masks else None)
    if guard.view.spread is None:
        _check_shapes(guard, state)
    return state


def _plain(name: str, value: Any, like: object) -> Any:
    """A value read from JSON, which must be of a kind with the one there is.

    That is a word, a list of pairs of numbers, a table of numbers or a number, which may be None where it is now.
    """
    numbers: list[Any] = [value]
    kind: Any = type(like) if isinstance(like, str | list | dict) else object
    fits = isinstance(value, kind)
    if isinstance(like, str) or (like is None and value is None):
        numbers = []
    elif fits and isinstance(like, list):
        fits = all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        numbers = [number for pair in value for number in pair] if fits else []
    elif fits and isinstance(like, dict):
        numbers = list(value.values())
    if not fits or not all(isinstance(number, float | int) for number in numbers):
        raise ValueError(f"{name} is {value!r} where {like!r} or the like belongs")
    return value


def _table(given: Mapping[str, Any], known: Mapping[str, object]) -> dict[str, Any]:
    """A table read from JSON, whose values must be of a kind with known ones."""
    return {key: _plain(key, value, known[key]) for key, value in given.items()}


def _words(name: str, values: Any) -> list[str]:
    """A list of domains read from JSON."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} is {values!r} where a list of domains belongs")
    return values


def _check_shapes(guard: Guard, state: DomainState) -> None:
    """Check a domain's sums and local model against the guard's blocks; raises `ValueError`."""
    for index, block in enumerate(guard.view.blocks if state.curvature.sums else ()):
        sums = state.curvature.sums[index]
        _fits(block, "energy", sums.energy, block.matrices, block.units)
        for name, found in (("sketch", sums.sketch), ("basis", sums.basis)):
            if found is not None:
                _fits(block, name, found, block.matrices, block.width, found.shape[-1])
        if state.model is not None:
            part = state.model.blocks[index]
            _fits(block, "energy", part.energy, block.matrices, block.units)
            _fits(block, "U", part.U, block.matrices, block.width, part.rank)
            _fits(block, "lam", part.lam, block.matrices, part.rank)
            _fits(block, "z0", part.z0, part.count, part.rank)
            _fits(block, "q0", part.q0, part.count, guard.view.residuals[index].shape[-1])


def _fits(block: Block, name: str, tensor: Tensor, *shape: int) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} of {block.name!r} has shape {tuple(tensor.shape)} where {shape} is needed")


def _listed(name: str, guard: Guard, get: Any) -> list[Tensor] | None:
    """Tensors of all blocks, None where they were not stored."""
    found = [get(f"{name}/{index}") for index in range(len(guard.view.blocks))]
    return [tensor for tensor in found if tensor is not None] or None


def _completions(prefix: str, get: Any, temperature: float) -> Completions | None:
    ids, attention, scored, rewards = (get(f"{prefix}/{name}") for name in ROWS)
    return None if ids is None else Completions(ids, attention, scored, rewards, temperature)


def tensor_bytes(guard: Guard) -> int:
    """Bytes of device memory the guard's curvatures and local models hold; shared memory counts once."""
    storages: dict[int, int] = {}
    for state in guard.domains.values():
        tensors: dict[str, Tensor] = {}
        _pack_domain(state, "", tensors)
        for key, tensor in tensors.items():
            if key.startswith(("sums/", "model/")):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
