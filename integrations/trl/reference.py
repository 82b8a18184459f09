"""Reference data: prompt and completion rows of abilities the model has before any RL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from trl.data_utils import apply_chat_template, is_conversational

from interference_guard.errors import ConfigError, HostError, ShapeError
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
        ConfigError: If it is no data set, or a row holds neither text nor messages; the message names the row.
        HostError: If a column is missing or there are no rows.
        ShapeError: If a row has no completion tokens; the message names the row.
    """
    # Of several splits they are a table by split.
    if isinstance(getattr(dataset, "column_names", {}), Mapping):
        raise ConfigError(
            f"reference[{name!r}] is a {type(dataset).__name__}; it must be a datasets.Dataset with the columns "
            "'prompt' and 'completion'. Make one by Dataset.from_list(rows) or load_dataset('json', "
            "data_files=path, split='train'), and take one split of several."
        )
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
    # An empty list is no conversation, and not looked into.
    conversational = [] not in row.values() and is_conversational(row)
    if not all(isinstance(value, list if conversational else str) for value in row.values()):
        shown = " and ".join(f"{column}={value!r:.60}" for column, value in row.items())
        raise ConfigError(
            f"Row {index} of reference[{name!r}] has {shown}; both must be text, or both lists of messages, "
            "{'role': ..., 'content': ...}. Convert them, or leave the row out."
        )
    text = apply_chat_template(row, words, **template) if conversational else row
    # Templates write their own special tokens.
    prompt = words(text["prompt"], add_special_tokens=not conversational).input_ids
    completion = words(text["completion"], add_special_tokens=False).input_ids
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
