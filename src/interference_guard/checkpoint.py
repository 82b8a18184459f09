"""The guard's state on disk: safetensors for tensors, JSON for the rest, versioned and written atomically.

`interference_guard.safetensors` and `interference_guard.json` lie beside the host's own checkpoint files
and nothing of the host's is opened. Of a sharded model every rank saves its part, `interference_guard_rank1`
and so on; another number of ranks reads all of them (see `recut`). Each is written under a temporary name
and then renamed; the JSON names the tensor file's size and a digest of it, so a torn pair or a truncated file
is found before anything is taken over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import StateError
from .files import DETAILS, TENSORS, beside, check_digest, digest
from .handover import check_resumed, checksums, piece_checksums
from .holdings import check_all, check_own
from .moment import check_moment, shared
from .origin import check, same_blocks, shards_of
from .packing import pack
from .recut import Part, recut, restored
from .together import Ready, take_together
from .written import Written, unwritten

if TYPE_CHECKING:
    from .guard import Guard


def save(guard: Guard, directory: Path, folders: int = 1, place: tuple[int, int] | None = None) -> None:
    """Write a guard's state into `directory`, which is made if missing.

    Args:
        guard: The guard.
        directory: This rank's folder.
        folders: How many folders all ranks save into.
        place: This rank and their number, among those that keep completions of their own; by default every rank
            that saves does.

    Raises:
        StateError: If the files cannot be written, for instance on a full disk, or ranks that hold the same
            weights and each their own completions would write the same files. Earlier files stay.
    """
    write(guard, directory, folders, place).publish()


def write(
    guard: Guard,
    directory: Path,
    folders: int = 1,
    place: tuple[int, int] | None = None,
    save_id: str | None = None,
) -> Written:
    """Write a guard's state under temporary names, flushed; errors are those of `save`.

    Args:
        guard: As for `save`.
        directory: As for `save`.
        folders: As for `save`.
        place: As for `save`.
        save_id: The same on all ranks and another at each saving, by which files of two of them are told apart.
    """
    if folders == 1 and place is None:
        _check_writers(guard)
    names = file_names(guard)
    files = [beside(directory / name) for name in names]
    written = Written(directory, files, names)
    try:
        packed = pack(guard, folders, place)
        tensors = {
            # Shared and strided memory cannot be stored as it is.
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in packed["tensors"].items()
        }
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, files[0])
        details = dict(packed["details"])
        details["tensor_bytes"] = files[0].stat().st_size
        details["tensor_sha256"] = digest(files[0])
        details["weights"] = checksums(guard.view)
        details["pieces"] = piece_checksums(guard.view)
        details["shared"] = shared(guard)
        if save_id is not None:
            details["save_id"] = save_id
        files[1].write_text(json.dumps(details, indent=1), encoding="utf-8")
        for path in files:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        # torch reports memory of the host that is used up, which copies of a large state need, by a RuntimeError.
        written.drop()
        raise unwritten(directory, error) from error
    except BaseException:
        written.drop()
        raise
    return written


def _check_writers(guard: Guard) -> None:
    """Replicas would overwrite each other's files, which are named by the part of the model that they hold."""
    everybody = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    writers = guard.view.shards.holders or everybody
    if guard.ranks.reduce is not None and writers > guard.view.shards.world:
        raise StateError(
            f"{writers} ranks keep completions of their own, and their model lies in {guard.view.shards.world} "
            "different parts, by which files are named: in one folder they would overwrite each other. Give each "
            "rank a folder of its own: guard.save(folder / str(rank), folders=ranks, place=(rank, ranks))."
        )


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
        guard: The guard to fill. With a reduction over ranks all of them call it, and none is changed where any
            of them raises.
        directory: Holds this rank's files.
        ranks: The folders of all ranks that saved, in their order, where there were as many folders as ranks, and
            another number of them than now; by default all files lie in `directory`.
        place: This rank and their number, among those that keep completions; by default among those that the
            model is sharded over.

    Raises:
        StateError: If a file is missing, damaged, or of another model or other settings; if the files are not all
            that are needed; or if ranks read those of different moments.
        StateVersionError: If it was written in a format this version cannot read.
    """
    take_together(guard, lambda: read(guard, directory, ranks, place))


def read(
    guard: Guard, directory: Path, ranks: Sequence[Path] | None = None, place: tuple[int, int] | None = None
) -> Ready:
    """Read and check what `load` takes over, on this rank alone; arguments and errors are the same."""
    own = directory / file_names(guard)[1]
    # A file of a rank that is beyond those of the latest save is of another moment.
    files = _details_files(guard, directory)
    if ranks is None and own in files and _is_own(guard, details := _read_details(guard, own)):
        check_moment([_read_details(guard, path) for path in files])
        check_own(guard, details, place, own)
        part = _read(guard, own)
    else:
        paths = [
            path for folder in ([directory] if ranks is None else ranks) for path in _details_files(guard, folder)
        ]
        if not paths:
            raise _missing(own)
        parts = [_read(guard, path) for path in paths]
        check_all([details for details, _ in parts], paths[0].parent)
        part = recut(guard, parts, place or (guard.view.shards.rank, guard.view.shards.world))
    return Ready(part[0], restored(guard, {"details": part[0], "tensors": part[1]}))


def load_own(
    guard: Guard,
    folder_of: Callable[[int], Path],
    rank: int,
    world: int,
    place: tuple[int, int] | None = None,
) -> None:
    """Read this rank's state where every rank saved into a folder of its own.

    Args:
        guard: As for `load`.
        folder_of: The folder of a rank.
        rank: This rank.
        world: Ranks now. Where another number saved, or the model lay on them in another way, all files are read
            and shared out anew.
        place: As for `load`; by default this rank among all.

    Raises:
        StateError: As `load`.
    """
    take_together(guard, lambda: read_own(guard, folder_of, rank, world, place))


def read_own(
    guard: Guard,
    folder_of: Callable[[int], Path],
    rank: int,
    world: int,
    place: tuple[int, int] | None = None,
) -> Ready:
    """Read and check what `load_own` takes over, on this rank alone; arguments and errors are the same."""
    folders = look_own(guard, folder_of, rank, world, place)
    return read(guard, folder_of(rank), folders, place or (rank, world))


def look_own(
    guard: Guard,
    folder_of: Callable[[int], Path],
    rank: int,
    world: int,
    place: tuple[int, int] | None = None,
) -> list[Path] | None:
    """Check what `load_own` reads as far as can be told without the tensors; arguments and errors are the same.

    Returns:
        The folders of all ranks that saved; None where this rank's own is all that it needs.
    """
    # Without a shared disk a rank sees the folders of its own machine alone, and asks its own.
    first, own = folder_of(0), folder_of(rank)
    saved = _folders(first if first.is_dir() else own, world)
    alone = saved == world and _is_part_of(guard, own, place or (rank, world))
    folders, mine = [folder_of(item) for item in range(saved)], own / file_names(guard)[1]
    paths = [path for folder in folders for path in _details_files(guard, folder)]
    if not paths or (alone and mine not in paths):
        raise _missing(mine)
    # Each rank looks at all that it sees, so that all of them refuse.
    found = [_read_details(guard, path) for path in paths]
    check_moment(found, complete=not alone)
    if not alone:
        check_all(found, first)
    for path in [mine] if alone else paths:
        _tensors_of(path)
    return None if alone else folders


def weights_beside(directory: Path) -> dict[str, str] | None:
    """The `checksums` of the weights that a state was saved beside; None where it holds none."""
    path = directory / DETAILS
    if not path.is_file():
        return None
    found: dict[str, str] | None = json.loads(path.read_text(encoding="utf-8")).get("weights")
    return found


def check_weights(guard: Guard, directory: Path, advice: str) -> None:
    """Check that weights a host has just read are those that the state beside them was saved with.

    Says nothing where it cannot be known: of a state by other ranks, and of one from before there were checksums.

    Args:
        guard: The guard of a run that is resumed.
        directory: This rank's folder, from which its state was read.
        advice: What to do where they are others.

    Raises:
        StateError: If they are others.
    """
    path = directory / file_names(guard)[1]
    details = _read_details(guard, path) if path.is_file() else {}
    if details.get("shards", [0, 1]) == shards_of(guard):
        check_resumed(details, guard.view, directory, advice)


def _is_part_of(guard: Guard, directory: Path, place: tuple[int, int]) -> bool:
    """Whether the files there are of ranks that share model and rows as they do now; also without any files."""
    details = [_read_details(guard, path) for path in _details_files(guard, directory)]
    return all(_is_own(guard, item) and item.get("place") in (None, list(place)) for item in details)


def _is_own(guard: Guard, details: Mapping[str, Any]) -> bool:
    """Whether a state is this rank's part, also a whole one whose parameters are stacked in another way."""
    sharded = guard.view.shards.sharded
    return details.get("shards", [0, 1]) == shards_of(guard) and (not sharded or same_blocks(guard, details))


def _folders(directory: Path, otherwise: int) -> int:
    """Into how many folders the state in one of them was saved, if it says so."""
    for path in sorted(directory.glob(f"{Path(DETAILS).stem}*.json")):
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["folders"])
        except (ArithmeticError, OSError, ValueError, KeyError, TypeError):
            # A damaged file is reported by who reads it.
            continue
    return otherwise


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
    details, tensors_path = _read_details(guard, path), _tensors_of(path)
    check_digest(tensors_path, details, "Copy it again or resume from another checkpoint.")
    try:
        return details, load_file(tensors_path)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{tensors_path} is damaged: {error}. Resume from another checkpoint.") from error


def _tensors_of(path: Path) -> Path:
    """The tensor file that belongs to a JSON file."""
    found = path.with_suffix(Path(TENSORS).suffix)
    if not found.is_file():
        raise _missing(found)
    return found


def _read_details(guard: Guard, path: Path) -> dict[str, Any]:
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{path} is damaged: {error}. Resume from another checkpoint.") from error
    if not isinstance(details, dict):
        raise StateError(f"{path} is damaged: it holds no table. Resume from another checkpoint.")
    check(guard, details, str(path))
    return details


def _missing(path: Path) -> StateError:
    return StateError(
        f"{path} does not exist. A guard's state is {DETAILS} and {TENSORS} side by side, a pair for "
        "each rank of a sharded model. Take a checkpoint that was saved with the guard attached, or begin "
        "without the guard's state."
    )
