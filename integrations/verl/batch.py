"""veRL's batches in the guard's words: domains of their rows, completions, and the policy that scores them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu

from interference_guard.errors import HostError, MissingDomainError
from interference_guard.probe import Completions

# Rows that veRL adds so that a batch splits evenly carry a uid of this kind and a mask of zeros.
PADDING = "pad"


def labels(data: Any, column: str) -> list[str | None]:
    """Domain of each row, None for a padding row.

    Raises:
        HostError: If the batch has no such column.
        MissingDomainError: If a row's domain is not a non-empty string; the message names the row.
    """
    found = tu.get(data, column)
    if found is None:
        raise HostError(
            f"The batch has no column {column!r}, only {sorted(map(str, data.keys()))}. Give every row of "
            "data.train_files a data_source, or name another column with +guard.domain_column=..."
        )
    names, uids = list(found), uids_of(data)
    for index, (name, uid) in enumerate(zip(names, uids, strict=True)):
        if is_padding(uid):
            names[index] = None
        elif not isinstance(name, str) or not name:
            raise MissingDomainError(
                f"Row {index} of the mini-batch (uid {uid}) has {column}={name!r}: every row needs a non-empty "
                f"string there. Fill the {column!r} column of data.train_files."
            )
    return names


def uids_of(data: Any) -> list[Any]:
    """The rows' uids: one for each prompt, shared by its completions; None where the batch has none."""
    found = tu.get(data, "uid")
    return [None] * len(data) if found is None else list(found)


def is_padding(uid: Any) -> bool:
    """Whether a row was added to fill a batch."""
    return isinstance(uid, str) and uid.startswith(PADDING)


def completions(data: Any, rows: Sequence[int]) -> Completions:
    """The chosen rows; prompt and completion lie side by side, padded on the right.

    Args:
        data: A mini-batch in veRL's layout without padding: nested ids, masks and rewards.
        rows: Their indices, at least one.

    Raises:
        HostError: If the batch is laid out in another way or has no rewards.
    """
    ids, mask, scores = (tu.get(data, name) for name in ("input_ids", "response_mask", "rm_scores"))
    if any(not isinstance(item, Tensor) or not item.is_nested for item in (ids, mask, scores)):
        raise HostError(
            "The batch has no nested input_ids, response_mask and rm_scores, by which the guard knows "
            "completions and their rewards. Use the default trainer (trainer.use_v1=true) of a tested release."
        )
    every = [list(item.unbind()) for item in (ids, mask, scores)]
    parts = [(every[0][row], every[1][row], every[2][row]) for row in rows]
    width = max(len(tokens) for tokens, _, _ in parts)
    input_ids = torch.zeros(len(parts), width, dtype=torch.int64, device=ids.device)
    attention, scored = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for place, (tokens, answer, _) in enumerate(parts):
        input_ids[place, : len(tokens)] = tokens
        attention[place, : len(tokens)] = 1
        scored[place, len(tokens) - len(answer) : len(tokens)] = answer.to(torch.int64)
    rewards = torch.stack([reward.float().sum() for _, _, reward in parts])
    return Completions(input_ids, attention, scored, rewards)


class FreshRows:
    """Tells rows that are seen for the first time in an update from those that a later epoch brings again.

    Args:
        completions: Completions of each prompt.
    """

    def __init__(self, completions: int) -> None:
        self.completions = completions
        self._seen: Counter[Any] = Counter()

    def take(self, uids: Sequence[Any]) -> list[int]:
        """Indices of the fresh rows."""
        fresh = []
        for index, uid in enumerate(uids):
            if is_padding(uid):
                continue
            self._seen[uid] += 1
            if uid is None or self._seen[uid] <= self.completions:
                fresh.append(index)
        return fresh

    def clear(self) -> None:
        """An update is over: the next rows are new."""
        self._seen.clear()


def scores(engine: Any, rows: Completions, temperature: float) -> Tensor:
    """Log-probabilities of completions through the engine's own forward pass; see `probe.Policy`.

    Every rank must call it with as many rows as the others: parameters are gathered on the way.

    Args:
        engine: The engine, with its parameters in place.
        rows: Completions, padded on the right.
        temperature: Of the sampling they came from.
    """
    config, model = engine.engine_config, engine.model_config
    micro = config.infer_micro_batch_size_per_gpu or config.micro_batch_size_per_gpu or 1
    # Micro-batches are of one size: the last row fills up what is missing.
    count = len(rows) if config.use_dynamic_bsz else -(-len(rows) // micro) * micro
    chosen = torch.arange(count).clamp(max=len(rows) - 1).tolist()
    lengths = rows.attention_mask.sum(1).tolist()
    ids = [rows.input_ids[row, : lengths[row]] for row in chosen]
    data = tu.get_tensordict(
        {
            "input_ids": _nested(ids),
            "position_ids": _nested([torch.arange(len(row), device=row.device) for row in ids]),
            "loss_mask": _nested([torch.ones_like(row) for row in ids]),
        },
        {
            "temperature": temperature,
            "calculate_entropy": False,
            "compute_loss": False,
            "use_remove_padding": model.use_remove_padding,
            "use_fused_kernels": model.use_fused_kernels,
            "use_dynamic_bsz": config.use_dynamic_bsz,
            "micro_batch_size_per_gpu": micro,
            "max_token_len_per_gpu": config.infer_max_token_len_per_gpu or config.max_token_len_per_gpu,
        },
    )
    modes = [(module, module.training) for module in engine.module.modules()]
    engine.module.eval()
    try:
        output = engine.infer_batch(data, loss_function=None)
    finally:
        for module, training in modes:
            module.training = training
    found = list(output["model_output"]["log_probs"].unbind())[: len(rows)]
    result = torch.zeros(rows.input_ids.shape, dtype=torch.float32, device=rows.input_ids.device)
    for row, values in enumerate(found):
        # Place t of the engine's answer scores token t + 1.
        result[row, 1 : len(values)] = values[:-1].to(result)
    return result * (rows.completion_mask != 0)


def _nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
