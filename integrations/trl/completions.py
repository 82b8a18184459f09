"""What TRL generates, in the guard's words: completions by domain, and the policy that scores them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from interference_guard.batching import in_batches
from interference_guard.errors import HostError
from interference_guard.evaluating import evaluating
from interference_guard.probe import Completions, Policy, model_policy

from .engines import batch_size

# The keyword by which TRL's own head is asked for.
FUSED = "fused_lm_head"
# Keys of a batch that hold what a text model does not read.
PICTURES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "input_features")


def generated(output: Mapping[str, Any], rewards: Tensor | None, temperature: float) -> Completions:
    """Completions of one generation, in the order of its rows.

    Args:
        output: What ``_generate_and_score_completions`` returned; masks and ids are ``(rows, length)``.
        rewards: ``(rows,)``, or None where the trainer has none.
        temperature: Of their sampling.

    Raises:
        HostError: If they answer pictures.
    """
    _check_text(output)
    prompt, prompt_mask = output["prompt_ids"], output["prompt_mask"]
    ids, mask = output["completion_ids"], output["completion_mask"]
    scored = mask if output.get("tool_mask") is None else mask * output["tool_mask"]
    return Completions(
        torch.cat([prompt, ids], 1),
        torch.cat([prompt_mask, mask], 1),
        torch.cat([torch.zeros_like(prompt_mask), scored], 1),
        rewards,
        temperature,
    )


def labelled(batch: Mapping[str, Any], count: int) -> Completions | None:
    """Rows of a supervised batch whose labels are scored; None where it holds no ids or labels.

    Args:
        batch: What the collator made; ids and labels are ``(rows, length)``, or ``(1, tokens)`` without padding
            between the rows.
        count: How many rows it was made of.

    Raises:
        HostError: If they are about pictures.
    """
    _check_text(batch)
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
        return None
    attention = batch.get("attention_mask")
    if attention is None:
        places = batch.get("position_ids")
        if not isinstance(places, Tensor):
            return None
        ids, labels, attention = _apart(ids, labels, places, count)
    scored = (labels != -100).to(torch.int64)
    # Nothing comes before the first token, so nothing foretells it.
    scored[:, 0] = 0
    return Completions(ids, attention, scored)


def _apart(ids: Tensor, labels: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that lie one after the other in a padding-free batch, ``(1, tokens)``, padded: ids, labels, mask."""
    begin = [*(places.flatten() == 0).nonzero().flatten().tolist(), places.numel()]
    lengths = [after - before for before, after in pairwise(begin)]
    # What fills the batch up to a multiple has position 0 and comes last: each token of it looks like a row.
    kept = count if all(length == 1 for length in lengths[count:]) else len(lengths)
    parts = [list(torch.split(tensor.flatten()[begin[0] :], lengths))[:kept] for tensor in (ids, labels)]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ones = [torch.ones_like(part) for part in parts[0]]
    return pad(parts[0]), pad(parts[1], padding_value=-100), pad(ones)


def _check_text(batch: Mapping[str, Any]) -> None:
    found = [name for name in PICTURES if batch.get(name) is not None]
    if found:
        raise HostError(
            f"The batch has {found[0]!r}. The guard scores rows as text alone, so the interference of rows with "
            "pictures or sound cannot be measured. Train text, or train without the guard."
        )


def sampling_temperature(trainer: Any) -> float:
    """Of a trainer's rollouts; 1 where it makes none."""
    return float(getattr(trainer, "temperature", 1.0))


def trainer_policy(trainer: Any) -> Policy:
    """Log-probabilities as the trainer itself computes them, with its kernels and batch size.

    Where there are more rows than that, those of like length go together, without their common padding.
    Its own way knows one temperature and never makes all logits. Rows of another trainer's are scored by the
    model's logits, one row at a time: they take much more room.
    """
    size = min(trainer.args.per_device_train_batch_size, batch_size(trainer))
    if hasattr(trainer, "_get_per_token_logps_and_entropies"):
        score = partial(_scores, trainer, size)
    elif _has_fused_head(trainer.model):
        score = partial(_fused_scores, trainer)
    else:
        return model_policy(trainer.model, batch_size=size)

    def policy(rows: Completions) -> Tensor:
        if rows.temperature != sampling_temperature(trainer):
            return model_policy(trainer.model, batch_size=1)(rows)
        with evaluating(trainer.model), torch.no_grad():
            # Not by a product: a token that is not scored may be impossible, and minus infinity times 0 is NaN.
            return in_batches(rows, size, score).where(rows.completion_mask != 0, 0.0)

    return policy


def _scores(trainer: Any, size: int, rows: Completions) -> Tensor:
    """By the method of a trainer that generates."""
    scored = rows.completion_mask.any(0).nonzero()
    first = max(int(scored[0]), 1) if len(scored) else 1
    scores, *_ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        rows.input_ids,
        rows.attention_mask,
        rows.input_ids.shape[1] - first,
        batch_size=size,
    )
    return torch.nn.functional.pad(scores.float(), (first, 0))


def _has_fused_head(model: Any) -> bool:
    """Whether the trainer has given the model a head that makes log-probabilities without all logits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = vars(base).get("forward")
    # Below the wrapper that accelerate puts around it for mixed precision.
    while forward is not None and FUSED not in inspect.signature(forward, follow_wrapped=False).parameters:
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


def _fused_scores(trainer: Any, rows: Completions) -> Tensor:
    """By that head, as `SFTTrainer` computes its loss."""
    labels = rows.input_ids.where(rows.completion_mask != 0, -100)
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "labels": labels}
    output = trainer.model(**inputs, **{FUSED: True})
    # Counted from the end: prompt tuning puts virtual tokens in front.
    found = output.log_probs[:, 1 - rows.input_ids.shape[1] :].float()
    return torch.nn.functional.pad(found, (1, 0))
