"""The two beds that methods are compared on, and one of them with a policy twice as wide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from . import digits, domains


@dataclass(frozen=True)
class Bed:
    """Domains, and how much of each is trained.

    Args:
        name: Of the bed.
        orders: Orders in which the domains are trained.
        rows: Rows of a domain: ``rows(domain, count, seed, test=False)``.
        templates: The fixed text in the domains' prompts.
        steps: Optimizer steps of each domain.
        prompts: Prompts of a step.
        longest: Most tokens of a completion.
        warm_steps: Supervised steps of the warm start.
        rate: Learning rate of runs that do not tune it, one at which plain training forgets.
        hidden: Width of the policy's residual stream.
    """

    name: str
    orders: tuple[tuple[str, ...], ...]
    rows: Callable[..., list[dict[str, str]]]
    templates: Callable[[Sequence[str]], list[str]]
    steps: int
    prompts: int
    longest: int
    warm_steps: int
    rate: float
    hidden: int = 64


def _other(order: tuple[str, ...]) -> tuple[str, ...]:
    """An order in which no domain keeps its neighbours or its place."""
    return tuple(order[(3 * place + 1) % len(order)] for place in range(len(order)))


GYM = Bed(
    "gym",
    (domains.ORDER, _other(domains.ORDER)),
    domains.rows,
    domains.templates,
    steps=60,
    prompts=32,
    longest=6,
    warm_steps=800,
    rate=7e-4,
)
DIGITS = Bed(
    "digits",
    (digits.ORDER, _other(digits.ORDER)),
    digits.rows,
    digits.templates,
    steps=100,
    prompts=16,
    longest=4,
    warm_steps=1600,
    rate=5e-4,
)
BEDS = {bed.name: bed for bed in (GYM, DIGITS)}
WIDE = replace(GYM, name="gym-128", hidden=128)


def named(name: str) -> Bed:
    """A bed by its name."""
    return WIDE if name == WIDE.name else BEDS[name]
