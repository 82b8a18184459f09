"""Orders of rows in which every generation batch trains one domain."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, SupportsFloat

import torch

from interference_guard.errors import ConfigError
from interference_guard.integrations.orders import ORDERS, planned
from interference_guard.rehearsal import Rehearsal

from .rows import DomainTable, check_dataset


def prompts_per_generation(args: Any) -> int:
    """Prompts that must be of one domain, for a `GRPOConfig` or `RLOOConfig`: those of a generation batch.

    Where optimizer steps take parts of several generation batches, those of as few batches as fill whole steps.
    Counted over all processes.

    Raises:
        ConfigError: For settings of a trainer that generates nothing.
    """
    if not has_generations(args):
        raise ConfigError(
            f"{type(args).__name__} has no generation batches. For an SFTTrainer give order_by_domain() the rows "
            "of one optimizer step, and set train_sampling_strategy='sequential'."
        )
    prompts = int(args.generation_batch_size) // int(args.num_generations)
    # Both in micro-batches: how long a generation batch is trained, and how many make a step.
    lasts = int(args.steps_per_generation) * int(args.num_iterations)
    return prompts * (math.lcm(lasts, int(args.gradient_accumulation_steps)) // lasts)


def has_generations(args: Any) -> bool:
    """Whether the settings are of a trainer that generates."""
    return hasattr(args, "generation_batch_size")


def order_by_domain(
    dataset: Any,
    prompts: int,
    order: str | Mapping[str, float] = "sequential",
    *,
    column: str = "domain",
    batches: int | Mapping[str, int] | None = None,
    rehearsal: float | None = 0.0,
    seed: int = 0,
) -> Any:
    """Reorder a dataset so that each generation batch is of one domain; use it with ``shuffle_dataset=False``.

    Rows are shuffled within their domain. A domain that runs out of rows starts anew, in another order.

    Args:
        dataset (`datasets.Dataset`): Rows with a domain each.
        prompts (`int`): Prompts of one generation batch, see `prompts_per_generation`.
        order (`str` or `dict[str, float]`, *optional*, defaults to `"sequential"`): ``"sequential"``: one
            domain after the other, in order of first appearance; ``"round_robin"``: a batch of each in turn;
            or weights by domain: batches drawn at random in these proportions.
        column (`str`, *optional*, defaults to `"domain"`): The domain's column.
        batches (`int` or `dict[str, int]`, *optional*): Generation batches of each domain; by default as many
            full ones as it has rows for. With weights, an integer is the number of all batches; with `rehearsal`,
            a domain with 0 is one that was trained before this run.
        rehearsal (`float`, *optional*, defaults to `0.0`): With ``"sequential"``, the share of each batch's
            prompts that are of domains trained before, in equal parts. Give the guard an `active_share` above it,
            0.5 for instance: otherwise it does not protect what is rehearsed.
        seed (`int`, *optional*, defaults to `0`): Of the shuffling and the draws.

    Returns:
        `datasets.Dataset`: A view of the same rows, ``batches * prompts`` of them.

    Raises:
        ConfigError: If the order, a weight, a number of batches or the rehearsal cannot be served.
        MissingDomainError: If a row has no domain.
    """
    size = integer(prompts)
    if size is None or size < 1:
        found = repr(prompts) if isinstance(prompts, int | float | str) else f"a {type(prompts).__name__}"
        raise ConfigError(
            f"prompts={found} is not allowed: it must be an integer of at least 1. For a GRPOTrainer give "
            "prompts_per_generation(args)."
        )
    prompts = size
    if not hasattr(dataset, "select"):
        raise ConfigError(
            f"A {type(dataset).__name__} cannot be put in another order. Give a datasets.Dataset (one split of "
            "several), or arrange a stream's rows yourself so that each generation batch is of one domain."
        )
    if rehearsal and order != "sequential":
        raise ConfigError(
            f"rehearsal={rehearsal!r} goes with order='sequential' alone, where domains are finished one after "
            f"the other; order is {order!r}, which takes them up again by itself."
        )
    names = check_dataset(dataset, DomainTable(column, "order_by_domain(..., column=...)"))
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        rows.setdefault(name, []).append(index)
    least = 0 if rehearsal else 1
    counts = _counts(rows, prompts, None if isinstance(order, Mapping) else batches, least)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(order, Mapping):
        total = sum(counts.values()) if batches is None else integer(batches)
        if total is None or total < 1:
            raise ConfigError(
                f"batches={batches!r} is not allowed: with weights it is the number of all batches, at least 1."
            )
        sequence = _draw(order, rows, total, generator)
    elif order in ORDERS:
        sequence = planned(order, list(rows), counts)
    else:
        raise ConfigError(
            f"order={order!r} is not allowed: it must be one of {list(ORDERS)} or weights by domain."
        )
    streams = {name: _stream(indices, generator) for name, indices in rows.items()}
    batch = Rehearsal(sequence, rows, prompts, rehearsal).batch
    return dataset.select([next(streams[name]) for number in range(len(sequence)) for name in batch(number)])


def _counts(
    rows: Mapping[str, list[int]], prompts: int, batches: int | Mapping[str, int] | None, least: int
) -> dict[str, int]:
    if batches is None:
        counts = {name: len(indices) // prompts for name, indices in rows.items()}
        small = [name for name, count in counts.items() if not count]
        if small:
            raise ConfigError(
                f"Domain {small[0]!r} has {len(rows[small[0]])} rows, fewer than the {prompts} prompts of one "
                "generation batch. Say how many batches it gets with batches=..., or use smaller batches."
            )
        return counts
    given = dict(batches) if isinstance(batches, Mapping) else dict.fromkeys(rows, batches)
    wrong = [number for number in given.values() if integer(number) is None]
    if wrong:
        raise ConfigError(f"batches={batches!r} is not allowed: {wrong[0]!r} is no integer.")
    counts = {name: operator.index(number) for name, number in given.items()}
    if set(counts) != set(rows) or min(counts.values()) < least:
        raise ConfigError(
            f"batches={batches!r} is not allowed: it must be at least {least} for each of the domains "
            f"{list(rows)}."
        )
    return counts


def _draw(
    weights: Mapping[str, float], rows: Mapping[str, list[int]], total: int, generator: torch.Generator
) -> list[str]:
    wrong = [name for name, weight in weights.items() if not is_weight(weight)]
    if wrong:
        raise ConfigError(
            f"order={dict(weights)!r} is not allowed: the weight of domain {wrong[0]!r} is "
            f"{weights[wrong[0]]!r}, and must be a number of at least 0."
        )
    if set(weights) != set(rows) or sum(weights.values()) <= 0:
        raise ConfigError(
            f"order={dict(weights)!r} is not allowed: it must give each of the domains {list(rows)} a weight of "
            "at least 0, and one of them more."
        )
    chances = torch.tensor([float(weights[name]) for name in rows], device="cpu")
    drawn = torch.multinomial(chances, total, replacement=True, generator=generator)
    names = list(rows)
    return [names[index] for index in drawn.tolist()]


def integer(value: Any) -> int | None:
    """An integer as Python's own, also one of NumPy's; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def is_weight(value: Any) -> bool:
    """Whether a value can be a domain's weight: a finite number of at least 0."""
    return isinstance(value, SupportsFloat) and 0 <= float(value) < math.inf


def _stream(indices: list[int], generator: torch.Generator) -> Any:
    while True:
        for place in torch.randperm(len(indices), generator=generator, device="cpu").tolist():
            yield indices[place]
