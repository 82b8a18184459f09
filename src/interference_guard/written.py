"""Files of a state between their writing and their place, and earlier ones that must go before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from .errors import StateError
from .files import DETAILS, STATE, beside


class Written:
    """A state that lies in its folder under temporary names, until it is put in place or dropped.

    Ranks that all write first, and then put theirs in place or drop them, have a state together or none.

    Args:
        directory: The folder.
        files: Tensor file and JSON file, as they are now.
        names: What they will be called.
    """

    def __init__(self, directory: Path, files: Sequence[Path], names: Sequence[str]) -> None:
        self.directory, self._files, self._names = directory, files, names

    def publish(self) -> None:
        """Put both files in place; where the second cannot be, the first is what it was before.

        Raises:
            StateError: If they cannot be moved. Earlier files stay.
        """
        try:
            _move(self.directory, self._files, self._names)
        except OSError as error:
            raise unwritten(self.directory, error) from error
        finally:
            self.drop()

    def drop(self) -> None:
        """Delete what is not in place."""
        for path in self._files:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def withdraw(directory: Path) -> None:
    """Delete the state in a folder, since the weights that it belongs to are about to be replaced.

    Raises:
        StateError: If it cannot be deleted.
    """
    try:
        # Without its JSON file a pair is none.
        kind = Path(DETAILS).suffix
        for path in sorted(directory.glob("interference_guard*"), key=lambda path: path.suffix != kind):
            if STATE.fullmatch(path.name):
                path.unlink(missing_ok=True)
        # What a killed process left half written.
        for path in directory.glob(".interference_guard*.tmp-*"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(
            f"The guard's earlier state in {directory} could not be deleted: {error}. It does not belong to the "
            "weights that are saved now. Delete it, or choose another folder."
        ) from error


def unwritten(directory: Path, error: Exception) -> StateError:
    """What to raise where a state cannot be written."""
    return StateError(
        f"The guard's state could not be written to {directory}: {error}. The checkpoint of the host is "
        "not touched. Free space (or memory, where that was short) or choose another folder, then save again."
    )


def _move(directory: Path, written: Sequence[Path], names: Sequence[str]) -> None:
    """Put both files in place; where the second cannot be, the first is what it was before."""
    tensors, before = directory / names[0], beside(directory / f"{names[0]}.old")
    # Of a process that was killed here, whose number came again.
    before.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        # Nothing to keep, or a file system without links.
        os.link(tensors, before)
    try:
        os.replace(written[0], tensors)
        os.replace(written[1], directory / names[1])
    except BaseException:
        if before.exists():
            os.replace(before, tensors)
        raise
    before.unlink(missing_ok=True)
