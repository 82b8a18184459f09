"""The second bed: eight ways to rewrite the same three digits, scored by exact match.

All domains read the same tokens at the same places and differ in one token, the name of the task. What one of
them changes on the way from the digits to the answer, seven others go through: they conflict by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Digits = list[int]

TASKS: dict[str, Callable[[Digits], Digits]] = {
    "reverse": lambda d: d[::-1],
    "differences": lambda d: [(x - y) % 10 for x, y in zip(d, _turned(d), strict=True)],
    "descending": lambda d: sorted(d, reverse=True),
    "running_sum": lambda d: [sum(d[: i + 1]) % 10 for i in range(len(d))],
    "successor": lambda d: [(x + 1) % 10 for x in d],
    "mirror_sum": lambda d: [(x + y) % 10 for x, y in zip(d, d[::-1], strict=True)],
    "complement": lambda d: [9 - x for x in d[::-1]],
    "neighbours": lambda d: [(x + y) % 10 for x, y in zip(d, _turned(d), strict=True)],
}
ORDER = tuple(TASKS)
BASE, LENGTH = 10, 3


def rows(domain: str, count: int, seed: int, test: bool = False) -> list[dict[str, str]]:
    """`count` rows with prompt, answer and domain; the same seed gives the same rows.

    A fifth of the thousand numbers is kept for tests: with `test` all rows are of it, without none.
    """
    generator = torch.Generator().manual_seed(seed)
    every = torch.randperm(BASE**LENGTH, generator=torch.Generator().manual_seed(0))
    apart = len(every) // 5
    numbers = every[:apart] if test else every[apart:]
    chosen = numbers[torch.randint(len(numbers), (count,), generator=generator)].tolist()
    return [
        {"prompt": f"{domain} {number:03d} =", "answer": _text(TASKS[domain](_digits(number))), "domain": domain}
        for number in chosen
    ]


def templates(domains: Sequence[str]) -> list[str]:
    """The fixed text around the digits, longest first."""
    return sorted([*(f"{name} " for name in domains), " ="], key=len, reverse=True)


def _digits(number: int) -> Digits:
    return [number // BASE**place % BASE for place in reversed(range(LENGTH))]


def _text(digits: Sequence[int]) -> str:
    return "".join(map(str, digits))


def _turned(digits: Digits) -> Digits:
    return [*digits[1:], digits[0]]
