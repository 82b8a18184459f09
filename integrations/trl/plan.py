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
    epochs = state.num_train_epochs
    if epochs <= 1:
        batches = batches[: math.ceil(state.max_steps / _steps_of_a_batch(args))]
        if missed := [name for name in names if not any(name in counts for counts in batches)]:
            warnings.warn(
                f"The run ends after max_steps={state.max_steps} steps, which take {len(batches) * size} of the "
                f"{len(rows)} rows: none of the domains {missed} are among them. Raise max_steps, or give "
                "order_by_domain() fewer batches of a domain.",
                stacklevel=3,
            )
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


def _steps_of_a_batch(args: Any) -> float:
    """Optimizer steps that are made of these rows."""
    if not _generates(args):
        return 1.0
    prompts = int(args.generation_batch_size) // int(args.num_generations)
    passes = args.num_iterations * args.steps_per_generation / args.gradient_accumulation_steps
    return float(passes * _batch(args) / prompts)
