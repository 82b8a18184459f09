"""What TRL generates, in the guard's words: completions by domain, and the policy that scores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interference_guard.probe import Completions, Policy, model_policy


def generated(output: Mapping[str, Any], rewards: Tensor | None) -> Completions:
    """Completions of one generation, in the order of its rows.

    Args:
        output: What ``_generate_and_score_completions`` returned; masks and ids are ``(rows, length)``.
        rewards: ``(rows,)``, or None where the trainer has none.
    """
    prompt, prompt_mask = output["prompt_ids"], output["prompt_mask"]
    ids, mask = output["completion_ids"], output["completion_mask"]
    scored = mask if output.get("tool_mask") is None else mask * output["tool_mask"]
    return Completions(
        torch.cat([prompt, ids], 1),
        torch.cat([prompt_mask, mask], 1),
        torch.cat([torch.zeros_like(prompt_mask), scored], 1),
        rewards,
    )


def labelled(batch: Mapping[str, Any]) -> Completions | None:
    """Rows of a supervised batch whose labels are scored, or None for packed rows without a mask."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
        return None
    attention = batch.get("attention_mask")
    if attention is None:
        # Padding-free rows hold several documents in one: they cannot be scored apart.
        return None
    return Completions(ids, attention, (labels != -100).to(torch.int64))


def trainer_policy(trainer: Any) -> Policy:
    """Log-probabilities as the trainer itself computes them: its temperature, kernels and batch size."""
    if not hasattr(trainer, "_get_per_token_logps_and_entropies"):
        return model_policy(trainer.model, batch_size=trainer.args.per_device_train_batch_size)

    def policy(rows: Completions) -> Tensor:
        scored = rows.completion_mask.any(0).nonzero()
        first = max(int(scored[0]), 1) if len(scored) else 1
        length = rows.input_ids.shape[1]
        modes = [(module, module.training) for module in trainer.model.modules()]
        trainer.model.eval()
        try:
            with torch.no_grad():
                scores, *_ = trainer._get_per_token_logps_and_entropies(
                    trainer.model,
                    rows.input_ids,
                    rows.attention_mask,
                    length - first,
                    batch_size=trainer.args.per_device_train_batch_size,
                )
        finally:
            for module, training in modes:
                module.training = training
        padded = torch.nn.functional.pad(scores.float(), (first, 0))
        return padded * (rows.completion_mask != 0)

    return policy
