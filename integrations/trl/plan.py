"""What a run will make of its rows, seen before it begins."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from interference_guard.telling import warn

from .order import has_generations, prompts_per_generation
from .rows import DomainTable, check_dataset


class Pace(NamedTuple):
    """How a trainer takes its rows.

    Args:
        batch: Rows that are trained together, in whole optimizer steps.
        steps: How many steps they are.
        whole: An epoch ends with the last whole group of so many rows.
    """

    batch: int
    steps: int
    whole: int

    @classmethod
    def of(cls, args: Any, size: int | None = None) -> Pace:
        """The pace of a trainer with these settings, where it does not generate with batches of `size` rows."""
        if has_generations(args):
            lasts, each = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
            prompts = args.generation_batch_size // args.num_generations
            return cls(prompts_per_generation(args), math.lcm(lasts, each) // each, prompts)
        micro = (size or args.train_batch_size) * args.world_size
        return cls(micro * args.gradient_accumulation_steps, 1, micro if args.dataloader_drop_last else 1)

    def kept(self, rows: int) -> int:
        """Rows of an epoch that are not dropped at its end."""
        return rows // self.whole * self.whole

    def reached(self, steps: int) -> int:
        """Rows of the batches that so many steps begin."""
        return -(-steps // self.steps) * self.batch


def look_ahead(
    dataset: Any, column: str, args: Any, state: Any, active_share: float, size: int | None = None
) -> None:
    """Warn where steps will mix domains, leave some out, or go through finished ones again.

    Args:
        dataset: The rows; a stream cannot be looked through.
        column: The domain's column.
        args: The trainer's settings.
        state: The trainer's, of which the length of the run is read and where it resumes.
        active_share: From which share of a batch's rows a domain counts as in training.
        size: Rows of a batch of one process, where the trainer does not take as many as its settings say.

    Raises:
        HostError: If the rows have no such column.
        MissingDomainError: If a row has no domain.
    """
    # The trainer may have been given other rows since it was looked through.
    rows = check_dataset(dataset, DomainTable(column))
    if len(set(rows)) > 1:
        for trouble in _troubles(rows, args, state, active_share, size):
            warn(trouble)


def _lowered(args: Any, size: int | None) -> str:
    """What there is to say of batches that are not as large as was asked for."""
    if has_generations(args) or size is None or size >= args.train_batch_size or not args.auto_find_batch_size:
        return ""
    return (
        f" auto_find_batch_size=True has lowered the batches of a process from {args.train_batch_size} rows to "
        f"{size}, which the order of the rows does not know: set it to False, with {size} rows from the start."
    )


def _troubles(rows: list[str], args: Any, state: Any, active_share: float, taken: int | None) -> Iterator[str]:
    lowered = _lowered(args, taken)
    pace = Pace.of(args, taken)
    size = pace.batch
    if not in_order(args):
        setting = "shuffle_dataset=False" if has_generations(args) else "train_sampling_strategy='sequential'"
        if size > 1:
            yield (
                f"The trainer draws rows of the domains {sorted(set(rows))} at random, so that its steps may mix "
                "them: of a step that does the guard learns nothing, and it protects none of its domains. Set "
                f"{setting}, and arrange the rows with order_by_domain()."
            )
        return
    if args.ignore_data_skip and state.global_step:
        yield (
            f"ignore_data_skip=True: the run resumes at step {state.global_step} with the first rows, so that "
            "domains whose turn is over are trained again. Set it to False, or give the rows that are left."
        )
    epochs, kept = state.num_train_epochs, pace.kept(len(rows))
    # Beyond one epoch, every row that is not dropped comes up.
    trained = rows[: kept if epochs > 1 else min(kept, pace.reached(state.max_steps))]
    if missed := sorted(set(rows) - set(trained)):
        why = (
            f"it ends after max_steps={state.max_steps} steps. Raise max_steps, or give order_by_domain() fewer "
            "batches of a domain."
            if len(trained) < kept
            else f"the trainer drops the last {len(rows) - kept}, which are no whole batch. Give each domain "
            f"whole ones, as order_by_domain(dataset, {size}) does."
        )
        count = f"Of the {len(rows)} rows the run trains {len(trained)}"
        yield f"{count}, of which none is of the domains {missed}: {why}{lowered}"
    # An epoch of which nothing is dropped, of single rows.
    filled = not has_generations(args) and args.world_size > 1 and not args.dataloader_drop_last
    rest = len(rows) % (size // args.gradient_accumulation_steps) if filled and len(trained) == len(rows) else 0
    if rest and rows[0] != rows[-1]:
        yield (
            f"The last {rest} of the {len(rows)} rows are no whole batch of {args.world_size} processes, and "
            f"accelerate fills it up with the first rows, of {rows[0]!r}: that domain is trained once more. Set "
            "dataloader_drop_last=True, or give each domain whole batches, as order_by_domain(dataset, "
            f"{size}) does.{lowered}"
        )
    # A last batch that is not full is no phase of its own.
    batches = [Counter(trained[start : start + size]) for start in range(0, len(trained) - size + 1, size)]
    for number, counts in enumerate(batches):
        active = [name for name, count in counts.items() if count >= active_share * size]
        if len(active) > 1:
            yield (
                f"Rows {number * size} to {number * size + size - 1} are one batch and hold "
                f"{dict(counts)}. {len(active)} domains have at least active_share={active_share} of it, so the "
                f"guard learns of none and protects none of them. order_by_domain(dataset, {size}) keeps domains "
                f"apart; where rows are only rehearsed, set active_share above their share.{lowered}"
            )
            return
    # Beside the domain in training a batch may hold others that are rehearsed.
    phases = [name for name, _ in groupby(counts.most_common(1)[0][0] for counts in batches)]
    if epochs > 1 and len(phases) > 1 and len(set(phases)) == len(phases):
        yield (
            f"The rows hold the domains {phases} one after the other, and the run goes through all of them "
            f"{math.ceil(epochs)} times: each is taken up again after the last. Set num_train_epochs=1 (with "
            "max_steps no more than the rows are enough for), and give order_by_domain() more batches for longer "
            "phases."
        )


def in_order(args: Any) -> bool:
    """Whether a trainer with these settings takes the rows in their order."""
    if has_generations(args):
        return not args.shuffle_dataset
    return str(getattr(args, "train_sampling_strategy", "random")) == "sequential"
