"""What a checkpoint says of given rows: nats per token, for the measured side of a rollback."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from interference_guard.errors import CheckpointError, ReportError
from interference_guard.probe import Completions, Policy, model_policy

Row = tuple[str, str]


def read_rows(path: Path) -> list[Row]:
    """Prompts and completions of a JSON-lines file.

    Raises:
        ReportError: If the file or a line cannot be used; the message names the line.
    """
    try:
        # Only a line feed ends a line of JSON: text may hold other separators.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ReportError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}. Give a JSON-lines file in "
            "UTF-8, a prompt and a completion a line."
        ) from error
    rows: list[Row] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            prompt, completion = line["prompt"], line["completion"]
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(
                f"{path}, line {number}, is not an object with 'prompt' and 'completion'. Mend or drop the line."
            ) from error
        if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
            raise ReportError(
                f"{path}, line {number}: prompt and completion must be texts, and the completion not empty. "
                "Apply the chat template first where the rows are messages."
            )
        rows.append((prompt, completion))
    if not rows:
        raise ReportError(f"{path} has no rows. Give at least one.")
    return rows


def nats_per_token(
    folder: Path, tables: Mapping[str, Sequence[Row]], tokenizer: Path | None = None, batch: int = 8
) -> dict[str, float]:
    """Mean negative log-probability of the completions' tokens under a saved model, which is loaded once.

    Args:
        folder: A model's folder, as `save_pretrained` writes it; nothing is downloaded.
        tables: Prompts and completions by name; without any nothing is loaded.
        tokenizer: Folder of the tokenizer; `folder` by default.
        batch: Rows of one forward pass.

    Returns:
        The mean of each table.

    Raises:
        ReportError: If transformers is not installed.
        CheckpointError: If the folder holds no causal language model, or no tokenizer.
    """
    if not tables:
        return {}
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ReportError('Measuring needs transformers: pip install "interference-guard[trl]".') from error
    try:
        words = AutoTokenizer.from_pretrained(tokenizer or folder, local_files_only=True)
        model = _language_model(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} cannot be run as a causal language model with a tokenizer: {error} Measure on folders "
            "that save_pretrained wrote (merge an adapter first), with the tokenizer beside the edited one."
        ) from error
    policy = model_policy(model)
    return {name: _nats(policy, words, rows, batch) for name, rows in tables.items()}


def _language_model(folder: Path) -> Any:
    """A saved model in fp32; of one that sees pictures too, all of it."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(AutoConfig.from_pretrained(folder, local_files_only=True))
    # Some of these can be loaded as language models too, and some as nothing else.
    other = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    load = AutoModelForImageTextToText if other else AutoModelForCausalLM
    return load.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def _nats(policy: Policy, words: Any, rows: Sequence[Row], batch: int) -> float:
    total, count = 0.0, 0
    for start in range(0, len(rows), batch):
        chosen = _completions(words, rows[start : start + batch])
        with torch.no_grad():
            total -= float(policy(chosen).double().sum())
        count += int(chosen.completion_mask.sum())
    return total / max(count, 1)


def _completions(words: Any, rows: Sequence[Row]) -> Completions:
    pieces = []
    for prompt, completion in rows:
        # A chat template that was applied before has written its first token already.
        special = not prompt.startswith(getattr(words, "bos_token", None) or "\0")
        before = words(prompt, add_special_tokens=special)["input_ids"]
        if not before:
            raise ReportError(
                "A row's prompt has no token, so nothing precedes its completion. Give every row a prompt."
            )
        after = words(completion, add_special_tokens=False)["input_ids"]
        pieces.append((before, after))
    length = max(len(before) + len(after) for before, after in pieces)
    ids = torch.zeros(len(pieces), length, dtype=torch.int64, device="cpu")
    attention, scored = torch.zeros_like(ids), torch.zeros_like(ids)
    for index, (before, after) in enumerate(pieces):
        end = len(before) + len(after)
        ids[index, :end] = torch.tensor([*before, *after], device="cpu")
        attention[index, :end] = 1
        scored[index, len(before) : end] = 1
    return Completions(ids, attention, scored)
