"""What a run will make of its rows, seen before it begins."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from itertools import groupby
from typing import Any

from .order import prompts_per_generation


def look_ahead(dataset: Any, column: str, args: Any, state: Any, active_share: float) -> None:
    """Warn where steps will mix domains, leave some out, or go through finished ones again.

    Args:
        dataset: The rows; a stream cannot be looked through.
        column: The domain's column.
        args: The trainer's settings.
        state: The trainer's, of which only the length of the run is read.
        active_share: From which share of a batch's rows a domain counts as in training.
    """
    rows = [str(name) for name in dataset[column][:]] if hasattr(dataset, "select") else []
    names, size = sorted(set(rows)), _batch(args)
    if len(names) < 2:
        return
    if not in_order(args):
        setting = "shuffle_dataset=False" if _generates(args) else "train_sampling_strategy='sequential'"
        if size > 1:
            warnings.warn(
                f"The trainer draws rows of the domains {names} at random, so that its steps may mix them: of a "
                "step that does the guard learns nothing, and it protects none of its domains. Set "
                f"{setting}, and arrange the rows with order_by_domain().",
                stacklevel=3,
            )
        return
    # A last batch that is not full is dropped, or is no phase of its own.
    batches = [Counter(rows[start : start + size]) for start in range(0, len(rows) - size + 1, size)]
    epochs, (each, steps) = state.num_train_epochs, _pace(args)
    # Beyond one epoch, every row that is not dropped comes up.
    reach = -(-state.max_steps // steps) * each if epochs <= 1 else len(rows)
    _tell_left_out(rows, args, reach, state.max_steps)
    batches = batches[: -(-reach // size)]
    for number, counts in enumerate(batches):
        active = [name for name, count in counts.items() if count >= active_share * size]
        if len(active) > 1:
            warnings.warn(
                f"Rows {number * size} to {number * size + size - 1} are one batch and hold "
                f"{dict(counts)}. {len(active)} domains have at least active_share={active_share} of it, so the "
                f"guard learns of none and protects none of them. order_by_domain(dataset, {size}) keeps domains "
                "apart; where rows are only rehearsed, set active_share above their share.",
                stacklevel=3,
            )
            return
    # Beside the domain in training a batch may hold others that are rehearsed.
    phases = [name for name, _ in groupby(counts.most_common(1)[0][0] for counts in batches)]
    if epochs > 1 and len(phases) > 1 and len(set(phases)) == len(phases):
        warnings.warn(
            f"The rows hold the domains {phases} one after the other, and the run goes through all of them "
            f"{math.ceil(epochs)} times: each is taken up again after the last. Set num_train_epochs=1 (with "
            "max_steps no more than the rows are enough for), and give order_by_domain() more batches for longer "
            "phases.",
            stacklevel=3,
        )


def _tell_left_out(rows: list[str], args: Any, reach: int, max_steps: int) -> None:
    kept, size = _kept(args, len(rows)), _batch(args)
    trained = set(rows[: min(kept, reach)])
    if not (missed := sorted(set(rows) - trained)):
        return
    if reach < kept:
        reason = (
            f"it ends after max_steps={max_steps} steps. Raise max_steps, or give order_by_domain() fewer "
            "batches of a domain."
        )
    else:
        reason = (
            f"the trainer drops the last {len(rows) - kept}, which are no whole batch. Give each domain whole "
            f"ones, as order_by_domain(dataset, {size}) does."
        )
    warnings.warn(
        f"Of the {len(rows)} rows the run trains {min(kept, reach)}, of which none is of the domains {missed}: "
        f"{reason}",
        stacklevel=4,
    )


def in_order(args: Any) -> bool:
    """Whether a trainer with these settings takes the rows in their order."""
    if _generates(args):
        return not args.shuffle_dataset
    return str(getattr(args, "train_sampling_strategy", "random")) == "sequential"


def _generates(args: Any) -> bool:
    return hasattr(args, "generation_batch_size")


def _batch(args: Any) -> int:
    """Rows of the data set that are trained together."""
    if _generates(args):
        return prompts_per_generation(args)
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def _pace(args: Any) -> tuple[int, int]:
    """Rows that are trained in whole optimizer steps, and in how many."""
    if not _generates(args):
        return _batch(args), 1
    lasts = args.num_iterations * args.steps_per_generation
    return _batch(args), math.lcm(lasts, args.gradient_accumulation_steps) // args.gradient_accumulation_steps


def _kept(args: Any, rows: int) -> int:
    """Rows of an epoch: generations are whole, and a last step may have fewer of them than others."""
    if _generates(args):
        prompts = int(args.generation_batch_size) // int(args.num_generations)
        return rows // prompts * prompts
    if args.dataloader_drop_last:
        each = int(args.train_batch_size * args.world_size)
        return rows // each * each
    return rows
