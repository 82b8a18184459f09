"""Reference data: prompt and completion rows of abilities the model has before any RL."""

from __future__ import annotations

from typing import Any

import torch
from trl.data_utils import apply_chat_template, is_conversational

from interference_guard.errors import HostError, ShapeError
from interference_guard.probe import Completions, join

from .completions import sampling_temperature

COLUMNS = ("prompt", "completion")
# 64 backward passes of 8 rows.
MOST_ROWS = 512


def read(trainer: Any, name: str, dataset: Any) -> Completions:
    """Tokenise a reference domain's rows as the trainer would.

    Args:
        trainer: Its tokenizer and chat template are used.
        name: The domain.
        dataset (`Dataset`): Rows with a `prompt` and a `completion`, as text or as messages; the first 512 count.

    Returns:
        Rows without rewards; the completion's tokens are scored.

    Raises:
        HostError: If a column is missing or there are no rows.
        ShapeError: If a row has no completion tokens; the message names the row.
    """
    absent = [column for column in COLUMNS if column not in (dataset.column_names or COLUMNS)]
    if absent:
        raise HostError(
            f"reference[{name!r}] has no column {absent[0]!r}; it has {sorted(dataset.column_names)}. Its rows "
            "need a prompt and the completion the model gives before training."
        )
    words = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    template = dict(getattr(trainer, "chat_template_kwargs", None) or {})
    parts = []
    for index, row in enumerate(dataset):
        if index == MOST_ROWS:
            break
        parts.append(_row(words, template, name, index, {column: row[column] for column in COLUMNS}))
    if not parts:
        raise HostError(f"reference[{name!r}] has no rows. Give some, or leave the domain out.")
    rows = join(parts)
    rows.temperature = sampling_temperature(trainer)
    return rows


def _row(words: Any, template: dict[str, Any], name: str, index: int, row: dict[str, Any]) -> Completions:
    conversational = is_conversational(row)
    text = apply_chat_template(row, words, **template) if conversational else row
    # Templates write their own special tokens.
    prompt = words(text["prompt"], add_special_tokens=not conversational).input_ids
    completion = words(text["completion"] or "", add_special_tokens=False).input_ids
    if not completion:
        raise ShapeError(
            f"Row {index} of reference[{name!r}] has completion={row['completion']!r}, which holds no token. "
            "Every row needs one; fill it or leave the row out."
        )
    if not conversational and words.eos_token_id is not None:
        completion = [*completion, words.eos_token_id]
    ids = torch.tensor([[*prompt, *completion]], device="cpu")
    scored = torch.zeros_like(ids)
    scored[:, len(prompt) :] = 1
    return Completions(ids, torch.ones_like(ids), scored)
