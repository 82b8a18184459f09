"""The folder that a new checkpoint goes to: what may be replaced, and how, without a moment that loses both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from interference_guard.errors import ReportError
from interference_guard.files import TENSORS

from .copying import TEMPLATES


def check_target(target: Path, sources: Iterable[Path], *, force: bool) -> None:
    """Refuse a place for a new checkpoint where something else would be lost.

    Args:
        target: The folder to write.
        sources: Everything that is read for it; neither these nor a folder above one may be the target.
        force: Whether an existing checkpoint may be replaced.

    Raises:
        ReportError: If the target is, or holds, a source; exists without `force`; or is no folder with one
            checkpoint and nothing else of weight.
    """
    resolved = [source.resolve() for source in sources]
    if target.resolve() in {place for source in resolved for place in (source, *source.parents)}:
        raise ReportError(
            f"{target} is, or holds, the checkpoint or the state that is read. Choose another folder for the "
            "result."
        )
    if not target.exists():
        return
    if not force:
        raise ReportError(f"{target} exists already. Choose another folder, or pass --force to replace it.")
    if not target.is_dir():
        raise ReportError(f"{target} is a file. Choose a folder for the result, or remove the file first.")
    inside = sorted(target.iterdir())
    # A run's folder may hold its last weights beside all earlier checkpoints.
    folder = next((item for item in inside if item.is_dir() and item.name != TEMPLATES), None)
    if folder is not None:
        raise ReportError(
            f"{target} holds folders, for instance {folder.name!r}, and only a folder with one checkpoint alone "
            "is replaced. Choose another folder for the result, or remove this one first."
        )
    if inside and not any(item.suffix == ".safetensors" and item.name != TENSORS for item in inside):
        raise ReportError(
            f"{target} holds files but no checkpoint, and only a checkpoint is replaced. Choose another folder "
            "for the result, or remove this one first."
        )


def put_in_place(finished: Path, target: Path) -> None:
    """Rename a finished folder to its target; what was there is deleted after that, and kept if it fails.

    Raises:
        OSError: If it cannot be renamed.
    """
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    replaces = target.exists()
    try:
        if replaces:
            os.rename(target, old)
        os.rename(finished, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    if old.is_symlink():
        old.unlink()
    elif replaces:
        shutil.rmtree(old, ignore_errors=True)
