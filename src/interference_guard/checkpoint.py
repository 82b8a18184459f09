"""The guard's state on disk: safetensors for tensors, JSON for the rest, versioned and written atomically.

`interference_guard.safetensors` and `interference_guard.json` lie beside the host's own checkpoint files
and nothing of the host's is opened. Of a sharded model every rank saves its part, `interference_guard_rank1`
and so on; another number of ranks reads all of them (see `recut`). Each is written under a temporary name
and then renamed; the JSON names the tensor file's size and a digest of it, so a torn pair or a truncated file
is found before anything is taken over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .curvature import BlockSums
from .domain import DomainState
from .errors import StateError, StateVersionError
from .files import DETAILS, TENSORS
from .first_order import GradientMean
from .local_model import LocalBlock, LocalModel
from .probe import Completions, Measurement
from .protected import ProtectedSet
from .recovery import RecoverySchedule
from .recut import Part, recut
from .trust_region import TrustRegion

if TYPE_CHECKING:
    from .guard import Guard

VERSION = 2
# Settings that give the saved tensors their meaning; the others may change between runs.
BINDING = ("rank", "sketch", "residual", "seed", "coverage", "selection", "unit_overrides")
PLAIN = (
    "anchored",
    "own_steps",
    "since_refresh",
    "foreign_steps",
    "low",
    "high",
    "anchor_reward",
    "evaluated",
    "measurable",
    "true_reward",
    "recent",
    "target_reward",
    "retained_reward",
    "scored_at",
    "reference",
)
# Not in every state of this version: read with the default where they are missing.
LATER = ("fresh", "interrupted")


def pack(guard: Guard, folders: int = 1) -> dict[str, object]:
    """A guard's state as ``{"details": JSON-ready, "tensors": {name: Tensor}}``; tensors are shared.

    Args:
        guard: The guard.
        folders: How many folders all ranks save into.
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
        "settings": {name: getattr(guard.config, name) for name in BINDING},
        "parameters": _parameters(guard),
        # For readers without the model: which layers are stored transposed cannot be seen from shapes.
        "transposed": sorted(guard.view.layout.transposed),
        "shards": _shards(guard),
        "blocks": [[view.name for view in block.views] for block in guard.view.blocks],
        "cuts": {name: part.axis for name, part in guard.view.shards.parts.items() if part.axis is not None},
        # Whether the ranks keep different completions.
        "dealt": guard.ranks.reduce is not None,
        "folders": folders,
        "domains": domains,
    }
    return {"details": details, "tensors": tensors}


def unpack(guard: Guard, packed: Mapping[str, object]) -> None:
    """Take over what `pack` made; raises before the guard is changed."""
    details, tensors = packed.get("details"), packed.get("tensors")
    if not isinstance(details, dict) or not isinstance(tensors, Mapping):
        raise StateError("The state has no 'details' and 'tensors'; it must be what Guard.state_dict() returned.")
    _check(guard, details, "The state")
    _check_shards(guard, details, "The state")
    try:
        domains = {
            name: _unpack_domain(guard, name, f"{number}/", item, tensors)
            for number, (name, item) in enumerate(details["domains"].items())
        }
        steps = int(details["steps"])
        schedule = RecoverySchedule(**details["recovery"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _incomplete(error) from error
    guard.replace_domains(domains, steps, schedule)


def save(guard: Guard, directory: Path, folders: int = 1) -> None:
    """Write a guard's state into `directory`, which is made if missing.

    Args:
        guard: The guard.
        directory: This rank's folder.
        folders: How many folders all ranks save into.

    Raises:
        StateError: If the files cannot be written, for instance on a full disk. Earlier files stay.
    """
    packed = pack(guard, folders)
    tensors = {
        # Shared and strided memory cannot be stored as it is.
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in packed["tensors"].items()  # type: ignore[attr-defined]
    }
    names = file_names(guard)
    temporary = [directory / f".{name}.tmp-{os.getpid()}" for name in names]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary[0])
        details = dict(packed["details"])  # type: ignore[call-overload]
        details["tensor_bytes"] = temporary[0].stat().st_size
        details["tensor_sha256"] = _digest(temporary[0])
        temporary[1].write_text(json.dumps(details, indent=1), encoding="utf-8")
        os.replace(temporary[0], directory / names[0])
        os.replace(temporary[1], directory / names[1])
    except (OSError, SafetensorError) as error:
        raise StateError(
            f"The guard's state could not be written to {directory}: {error}. The checkpoint of the host is "
            "not touched. Free space or choose another folder, then save again."
        ) from error
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def file_names(guard: Guard) -> tuple[str, str]:
    """Names of the tensor file and the JSON file of this rank."""
    rank = guard.view.shards.rank
    if not rank:
        return TENSORS, DETAILS
    tensors, details = (Path(name) for name in (TENSORS, DETAILS))
    return f"{tensors.stem}_rank{rank}{tensors.suffix}", f"{details.stem}_rank{rank}{details.suffix}"


def load(
    guard: Guard,
    directory: Path,
    ranks: Sequence[Path] | None = None,
    place: tuple[int, int] | None = None,
) -> None:
    """Read what `save` wrote into `directory`, by as many ranks as there are now or by others.

    Args:
        guard: The guard to fill.
        directory: Holds this rank's files.
        ranks: The folders of all ranks that saved, in their order, where there were as many folders as ranks, and
            another number of them than now; by default all files lie in `directory`.
        place: This rank and their number, among those that keep completions; by default among those that the
            model is sharded over.

    Raises:
        StateError: If a file is missing, damaged, or of another model or other settings.
        StateVersionError: If it was written in a format this version cannot read.
    """
    place = place or (guard.view.shards.rank, guard.view.shards.world)
    own = directory / file_names(guard)[1]
    if ranks is None:
        details = _read_details(guard, own) if own.is_file() else None
        if details is not None and details.get("shards", [0, 1]) == _shards(guard):
            _take(guard, _read(guard, own))
            return
    paths = [
        path for folder in ([directory] if ranks is None else ranks) for path in _details_files(guard, folder)
    ]
    if not paths:
        raise _missing(own)
    try:
        part = recut(guard, [_read(guard, path) for path in paths], place)
    except (KeyError, TypeError, ValueError) as error:
        raise _incomplete(error) from error
    _take(guard, part)


def _take(guard: Guard, part: Part) -> None:
    unpack(guard, {"details": part[0], "tensors": part[1]})


def folders_of(directory: Path, now: int) -> int:
    """Into how many folders, one for each rank that keeps completions, the state in one of them was saved.

    Args:
        directory: A rank's folder.
        now: The answer where the state does not say or is not there.
    """
    for path in sorted(directory.glob(f"{Path(DETAILS).stem}*.json")):
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["folders"])
        except (OSError, ValueError, KeyError, TypeError):
            # A damaged file is reported by who reads it.
            continue
    return now


def _details_files(guard: Guard, directory: Path) -> list[Path]:
    """The JSON files of all ranks in a folder, in the order of ranks."""
    stem = Path(DETAILS).stem
    found = {
        int(number or 0): path
        for path in directory.glob(f"{stem}*.json")
        if (number := path.stem.removeprefix(stem).removeprefix("_rank")).isdigit() or not number
    }
    if 0 in found:
        # More ranks may have saved here before: their files are of another moment.
        world = _read_details(guard, found[0]).get("shards", (0, 1))[1]
        found = {rank: path for rank, path in found.items() if rank < world}
    return [found[rank] for rank in sorted(found)]


def _read(guard: Guard, path: Path) -> Part:
    """One rank's details and tensors, checked but for its number."""
    details = _read_details(guard, path)
    tensors_path = path.with_suffix(Path(TENSORS).suffix)
    if not tensors_path.is_file():
        raise _missing(tensors_path)
    size = tensors_path.stat().st_size
    if size != details.get("tensor_bytes") or _digest(tensors_path) != details.get("tensor_sha256"):
        raise StateError(
            f"{tensors_path} is damaged: it has {size} bytes where {details.get('tensor_bytes')} with a known "
            "digest were written. Copy it again or resume from another checkpoint."
        )
    try:
        return details, load_file(tensors_path)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{tensors_path} is damaged: {error}. Resume from another checkpoint.") from error


def _read_details(guard: Guard, path: Path) -> dict[str, Any]:
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{path} is damaged: {error}. Resume from another checkpoint.") from error
    if not isinstance(details, dict):
        raise StateError(f"{path} is damaged: it holds no table. Resume from another checkpoint.")
    _check(guard, details, str(path))
    return details


def _missing(path: Path) -> StateError:
    return StateError(
        f"{path} does not exist. A guard's state is {DETAILS} and {TENSORS} side by side, a pair for "
        "each rank of a sharded model; resume from a checkpoint that was saved with the guard "
        "attached, or start without resuming."
    )


def _incomplete(error: Exception) -> StateError:
    return StateError(
        f"The state is incomplete: {type(error).__name__}: {error}. Use one that Guard.save() finished."
    )


def _check(guard: Guard, details: Mapping[str, Any], source: str) -> None:
    if details.get("format") != "interference_guard":
        raise StateError(f"{source} was not written by interference_guard. Point to a guard's state file.")
    if details.get("version") != VERSION:
        raise StateVersionError(
            f"{source} has format version {details.get('version')!r}; this version reads {VERSION}. "
            "Use the release of interference-guard that wrote it, or start a new guard."
        )
    settings = details.get("settings", {})
    for name in BINDING:
        if settings.get(name) != getattr(guard.config, name):
            raise StateError(
                f"{source} was made with {name}={settings.get(name)!r}, this guard has "
                f"{name}={getattr(guard.config, name)!r}. Use the same value; budgets and step counts may "
                "change, these may not: " + ", ".join(BINDING) + "."
            )
    saved, own = details.get("parameters", {}), _parameters(guard)
    if saved != own:
        different = sorted(name for name in {*saved, *own} if saved.get(name) != own.get(name))
        name = different[0] if different else "their order"
        raise StateError(
            f"{source} is of another model: {len(different)} of {len({*saved, *own})} parameters differ, for "
            f"instance {name!r} with shape {saved.get(name)} there and {own.get(name)} here. Load it into "
            "the model it was saved with."
        )


def _check_shards(guard: Guard, details: Mapping[str, Any], source: str) -> None:
    saved, own = details.get("shards", [0, 1]), _shards(guard)
    if saved != own:
        raise StateError(
            f"{source} is rank {saved[0]} of {saved[1]} of a sharded model, this is rank {own[0]} of {own[1]}. "
            "Each rank has a part of its own: give it that, or read the files of all ranks with Guard.load()."
        )


def _parameters(guard: Guard) -> dict[str, list[int]]:
    return {view.name: list(view.shape) for block in guard.view.blocks for view in block.views}


def _shards(guard: Guard) -> list[int]:
    return [guard.view.shards.rank, guard.view.shards.world]


def _pack_domain(state: DomainState, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    def put(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            tensors[prefix + name] = tensor

    details: dict[str, Any] = {name: getattr(state, name) for name in (*PLAIN, *LATER)}
    details["region"] = state.region.state()
    details["rollouts"] = list(state.rollouts.sums())
    details["measurement"] = None if state.measurement is None else asdict(state.measurement)
    put("count", state.curvature.count)
    for index, sums in enumerate(state.curvature.sums):
        for name in ("sketch", "energy", "basis", "eigenvalues"):
            put(f"sums/{index}/{name}", getattr(sums, name))
    details["model"] = state.model is not None
    put("noise", None if state.model is None else state.model.noise)
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
            for item in fields(rows):
                put(f"completions/{group}/{item.name}", getattr(rows, item.name))
    details["pending"] = len(state.pending)
    for index, tensor in enumerate(state.start or ()):
        put(f"start/{index}", tensor)
    for index, tensor in enumerate(state.slopes or ()):
        put(f"slopes/{index}", tensor)
    if state.gradient is not None:
        put("gradient/count", state.gradient.count)
        for index, tensor in enumerate(state.gradient.sums):
            put(f"gradient/{index}", tensor)
    for name in ("anchor_scores", "radius", "subspace", "moved"):
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
        setattr(state, key, details[key])
    for key in LATER:
        setattr(state, key, details.get(key, getattr(state, key)))
    state.rollouts.add(*details["rollouts"])
    region = dict(details["region"])
    region |= {"budget": guard.config.budget, "budget_nats": guard.config.budget_nats}
    state.region = TrustRegion(**region)
    if details["measurement"] is not None:
        state.measurement = Measurement(**details["measurement"])
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
    state.retained = _completions("completions/retained", get)
    for index in range(details["pending"]):
        rows_of_batch = _completions(f"completions/{index}", get)
        if rows_of_batch is not None:
            state.pending.append(rows_of_batch)
    state.start = _listed("start", guard, get)
    state.slopes = _listed("slopes", guard, get)
    count = get("gradient/count")
    if count is not None:
        sums_of_gradient = _listed("gradient", guard, get) or []
        state.gradient = GradientMean(guard.view.omegas, sums_of_gradient, count, guard.view.spread)
    for key in ("anchor_scores", "radius", "subspace", "moved"):
        setattr(state, key, get(key))
    for key in ("protected_set", "half_set"):
        masks = {
            view.name: tensors[f"{prefix}{key}/{view.name}"]
            for block in guard.view.blocks
            for view in block.views
            if f"{prefix}{key}/{view.name}" in tensors
        }
        setattr(state, key, ProtectedSet(masks) if masks else None)
    return state


def _listed(name: str, guard: Guard, get: Any) -> list[Tensor] | None:
    """Tensors of all blocks, None where they were not stored."""
    found = [get(f"{name}/{index}") for index in range(len(guard.view.blocks))]
    return [tensor for tensor in found if tensor is not None] or None


def _completions(prefix: str, get: Any) -> Completions | None:
    ids = get(f"{prefix}/input_ids")
    if ids is None:
        return None
    masks = [get(f"{prefix}/{name}") for name in ("attention_mask", "completion_mask", "rewards")]
    return Completions(ids, *masks)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


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
