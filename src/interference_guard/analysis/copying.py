"""What a rolled-back checkpoint takes over from its source: all that still holds of the weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from interference_guard.files import CARD, HISTORY, REPORT, STATE, without_section

from .checkpoints import INDEX, SINGLE, Checkpoint

# A trainer's own state would no longer fit the weights; the guard's records are of the run as it was.
LEFT_OUT = (
    "optimizer",
    "scheduler",
    "rng_state",
    "trainer_state",
    "training_args",
    "scaler",
    "pytorch_model",
    # Also what was set aside as damaged.
    HISTORY,
)
# What an earlier save in shards left beside a whole file: nobody reads it, and it holds other weights.
STALE = re.compile(rf"{re.escape(INDEX)}|model-\d+-of-\d+\.safetensors")
# Where transformers saves all chat templates of a tokenizer but the first.
TEMPLATES = "additional_chat_templates"


def copy_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy a checkpoint's files into an empty folder, the model card without the guard's section.

    Raises:
        OSError: If one cannot be written.
    """
    source, read = checkpoint.path, {entry.path for entry in checkpoint.entries.values()}
    files = read if source.is_file() else {*source.iterdir(), *(source / TEMPLATES).glob("*.jinja"), *read}
    for file in sorted(files):
        if not file.is_file() or (file not in read and _left_out(file.name, source / SINGLE[0] in read)):
            continue
        copy = copy_of(file, source, folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        if file.name == CARD:
            # Bytes that are no UTF-8, and ends of lines, stay as they are.
            text = file.read_bytes().decode("utf-8", "surrogateescape")
            copy.write_bytes(without_section(text).encode("utf-8", "surrogateescape"))


def _left_out(name: str, single: bool) -> bool:
    """Whether a file says nothing of the new weights; `single`: they lie in one whole file."""
    known = name == REPORT or STATE.fullmatch(name) is not None or name.startswith(LEFT_OUT)
    return known or (single and STALE.fullmatch(name) is not None)


def copy_of(file: Path, source: Path, folder: Path) -> Path:
    """Where a file of the checkpoint goes: an index may name shards in folders of its own."""
    return folder / (file.name if file == source else file.relative_to(source))
