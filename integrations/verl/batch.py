"""veRL's batches in the guard's words: domains of their rows, completions, and the policy that scores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu

from interference_guard.errors import HostError, MissingDomainError
from interference_guard.evaluating import evaluating
from interference_guard.names import named
from interference_guard.probe import Completions

# Rows that veRL adds so that a batch splits evenly carry a uid of this kind and a mask of zeros.
PADDING = "pad"
# The column that every trainer hands on, a table of what a data set's rows hold besides.
CARRIER = "extra_info"
# The column of a row's number in its update.
ROW = "interference_guard_row"


def labels(data: Any, column: str, uids: Sequence[Any]) -> list[str | None]:
    """Domain of each row, None for a padding row: from its column, or from the row's `extra_info`.

    Args:
        data: An update, or a mini-batch of it.
        column: Name of the column.
        uids: What `uids_of` returned.

    Raises:
        HostError: If the batch has no such column.
        MissingDomainError: If a row's domain is not a non-empty string; the message names the row.
    """
    found = tu.get(data, column)
    if found is None:
        rows = tu.get(data, CARRIER) or ()
        carried = [row.get(column) if isinstance(row, Mapping) else None for row in rows]
        found = carried if any(name is not None for name in carried) else None
    if found is None:
        raise HostError(
            f"The batch has no column {column!r}, only {sorted(map(str, data.keys()))}, nor is it in the rows' "
            f"{CARRIER}. Give every row of data.train_files a data_source, or name another column with "
            f"+guard.domain_column=...; trainer V0 (trainer.use_v1=false) hands on data_source and {CARRIER} "
            "alone."
        )
    names = list(found)
    for index, (name, uid) in enumerate(zip(names, uids, strict=True)):
        if is_padding(uid):
            names[index] = None
        elif not named(name):
            raise MissingDomainError(
                f"Row {index} of the batch (uid {uid}) has {column}={name!r}: every row needs a non-empty "
                f"string there. Fill the {column!r} column of data.train_files."
            )
    return names


def temperature_of(data: Any) -> float | None:
    """The temperature that a batch was sampled at, None where it does not say.

    Raises:
        HostError: If its rows were sampled at several.
    """
    found = tu.get(data, "temperature")
    if not isinstance(found, Tensor):
        return None if found is None else float(found)
    low, high = float(found.min()), float(found.max())
    if low < high:
        raise HostError(
            f"The batch has rows sampled at temperatures from {low:g} to {high:g}. A domain's completions are "
            "scored at one, so give all rows the same."
        )
    return low


def uids_of(data: Any) -> list[Any]:
    """The rows' uids: one for each prompt, shared by its completions; None where the batch has none."""
    found = tu.get(data, "uid")
    return [None] * len(data) if found is None else list(found)


def is_padding(uid: Any) -> bool:
    """Whether a row was added to fill a batch."""
    return isinstance(uid, str) and uid.startswith(PADDING)


def completions(data: Any, rows: Sequence[int], temperature: float) -> Completions:
    """The chosen rows; prompt and completion lie side by side, padded on the right.

    Args:
        data: A mini-batch as the engine gets it: nested ids, and masks and rewards of the answers, nested
            (trainer V1) or padded on the right (trainer V0).
        rows: Their indices, at least one.
        temperature: Of the sampling they came from.

    Raises:
        HostError: If the batch is laid out in another way, has no rewards, holds pictures, or has positions along
            several axes, as vision-language models take them for text too.
    """
    positions = tu.get(data, "position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 3:
        raise HostError(
            "The batch has position_ids along several axes, as vision-language models with multimodal rotary "
            "positions take them. The guard scores completions as text alone. Train a text model, or take the "
            "guard out of actor_rollout_ref.model.external_lib."
        )
    if any(tu.get(data, "multi_modal_inputs") or ()):
        raise HostError(
            "The batch has multi_modal_inputs. The guard scores completions as text alone, so their interference "
            "cannot be measured. Train text, or take the guard out of actor_rollout_ref.model.external_lib."
        )
    ids, mask, scores = tu.get(data, "input_ids"), tu.get(data, "response_mask"), rewards_of(data)
    whole = tu.get(data, "attention_mask")
    known = all(isinstance(item, Tensor) for item in (ids, mask, scores)) and ids.is_nested
    if not known or not (mask.is_nested or isinstance(whole, Tensor)):
        raise HostError(
            "The batch has no nested input_ids, or no response_mask and rm_scores, by which the guard knows "
            f"completions and their rewards; it has {sorted(map(str, data.keys()))}. Use the trainers of a "
            'tested release: pip install "interference-guard[verl]".'
        )
    # Taking a nested tensor apart row by row, or padding all of it, costs more than the rest of the guard.
    chosen = torch.tensor(rows, device=ids.device)
    lengths = ids.offsets().diff()[chosen].unsqueeze(1)
    found = mask.offsets().diff() if mask.is_nested else whole[:, -mask.shape[1] :].sum(1)
    scored_lengths = found[chosen].unsqueeze(1)
    places = torch.arange(int(lengths.max()), device=ids.device)
    inside = places < lengths
    # The answer is the end of the row: place t of the row is place t - start of the answer.
    start = lengths - scored_lengths
    answered = inside & (places >= start)
    tokens = _take(ids, chosen, places).to(torch.int64) * inside
    scored = _take(mask, chosen, (places - start).clamp(min=0)).to(torch.int64) * answered
    rewards = torch.where(answered, _take(scores, chosen, (places - start).clamp(min=0)).float(), 0.0)
    return Completions(tokens, inside.to(torch.int64), scored, rewards.sum(1), temperature)


def _take(values: Any, rows: Tensor, places: Tensor) -> Tensor:
    """``values[row, place]`` for every row and its places; beyond a row's end anything."""
    places = places.expand(len(rows), -1)
    found: Tensor
    if not values.is_nested:
        found = values[rows.unsqueeze(1), places.clamp(max=values.shape[1] - 1)]
        return found
    flat = values.values()
    found = flat[(values.offsets()[rows].unsqueeze(1) + places).clamp(max=len(flat) - 1)]
    return found


def rewards_of(data: Any) -> Any:
    """Rewards of the answers' tokens, None where the batch has none; the trainers name them differently."""
    found = tu.get(data, "rm_scores")
    return tu.get(data, "token_level_scores") if found is None else found


def finite_rewards(data: Any) -> list[bool]:
    """Whether each row's reward is a number; all are where the batch has no rewards."""
    rewards = rewards_of(data)
    if rewards is None:
        return [True] * len(data)
    flat = rewards.values() if rewards.is_nested else rewards
    if bool(flat.isfinite().all()):
        return [True] * len(data)
    return [bool(row.isfinite().all()) for row in rewards.unbind()]


def number_rows(data: Any) -> None:
    """Give every row of an update a number in place, by which later epochs' copies of it are known."""
    data[ROW] = torch.arange(len(data), device=data.device)


def row_numbers(data: Any) -> list[int | None]:
    """The rows' numbers in their update; None where nobody gave them any."""
    found = tu.get(data, ROW)
    return [None] * len(data) if found is None else found.tolist()


class FreshRows:
    """Tells rows that are seen for the first time in an update from those that a later epoch brings again."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def take(self, numbers: Sequence[int | None]) -> list[int]:
        """Indices of the fresh rows; one without a number is fresh."""
        fresh = [index for index, number in enumerate(numbers) if number is None or number not in self._seen]
        self._seen.update(number for number in numbers if number is not None)
        return fresh

    def clear(self) -> None:
        """An update is over: the next rows are new."""
        self._seen.clear()


def log_probabilities(engine: Any, rows: Completions) -> Tensor:
    """Log-probabilities of completions through the engine's own forward pass; see `probe.Policy`.

    Every rank must call it with as many rows as the others: parameters are gathered on the way.

    Args:
        engine: The engine, with its parameters in place.
        rows: Completions, padded on the right.
    """
    config, model = engine.engine_config, engine.model_config
    # Gradients and the optimizer's state are in memory, as in training and not as in inference.
    micro = min(_least(config.infer_micro_batch_size_per_gpu, config.micro_batch_size_per_gpu) or 1, len(rows))
    # Micro-batches are of one size: the last row fills up what is missing.
    count = len(rows) if config.use_dynamic_bsz else -(-len(rows) // micro) * micro
    chosen = torch.arange(count, device="cpu").clamp(max=len(rows) - 1).tolist()
    lengths = rows.attention_mask.sum(1).tolist()
    ids = [rows.input_ids[row, : lengths[row]] for row in chosen]
    data = tu.get_tensordict(
        {
            "input_ids": _nested(ids),
            "position_ids": _nested([torch.arange(len(row), device=row.device) for row in ids]),
            "loss_mask": _nested([torch.ones_like(row) for row in ids]),
        },
        {
            "temperature": rows.temperature,
            "calculate_entropy": False,
            "compute_loss": False,
            "use_remove_padding": model.use_remove_padding,
            "use_fused_kernels": model.use_fused_kernels,
            "use_dynamic_bsz": config.use_dynamic_bsz,
            "micro_batch_size_per_gpu": micro,
            "max_token_len_per_gpu": _least(config.infer_max_token_len_per_gpu, config.max_token_len_per_gpu),
        },
    )
    with evaluating(engine.module):
        output = engine.infer_batch(data, loss_function=None)
    found = list(output["model_output"]["log_probs"].unbind())[: len(rows)]
    result = torch.zeros(rows.input_ids.shape, dtype=torch.float32, device=rows.input_ids.device)
    for row, values in enumerate(found):
        # Place t of the engine's answer scores token t + 1.
        result[row, 1 : len(values)] = values[:-1].to(result)
    # Not by a product: a token that is not scored may be impossible, and minus infinity times 0 is NaN.
    return result.where(rows.completion_mask != 0, 0.0)


def _least(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size), default=None)


def _nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
