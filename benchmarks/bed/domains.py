"""Domains of the bed: reasoning-gym tasks in small sizes, scored by exact match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import reasoning_gym

# Tasks that read the same kind of input through the same weights and must answer differently: a pair of
# numbers under four operations, a word under two. That is where domains truly conflict.
SETTINGS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": False},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 40},
    "lcm": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 9},
    "count_bits": {"min_n": 1, "max_n": 255},
    "spell_backward": {"min_word_len": 3, "max_word_len": 3},
    "caesar_cipher": {"min_words": 1, "max_words": 1, "min_rotation": 1, "max_rotation": 1},
    "count_primes": {"min_n": 1, "max_n": 30},
}
# The order of training; the last one is followed by nothing.
ORDER = (
    "spell_backward",
    "products",
    "gcd",
    "caesar_cipher",
    "lcm",
    "count_bits",
    "chain_sum",
    "count_primes",
)


def rows(domain: str, count: int, seed: int, test: bool = False) -> list[dict[str, str]]:
    """`count` rows with prompt, answer and domain; the same seed gives the same rows.

    Rows for tests (`test`) are drawn from the same inputs: some tasks have only a hundred, so what is tested is
    whether they are kept, not whether they generalise.
    """
    data = reasoning_gym.create_dataset(domain, size=6 * count, seed=seed, **SETTINGS[domain])
    found = []
    for item in data:
        question, answer = item["question"].strip(), item["answer"].strip()
        word = re.search(r"nus\): (\w+)$", question)
        # Capitals would double the alphabet of the speller; long answers cost generation time.
        if len(answer) > 5 or (word and not word[1].islower()):
            continue
        found.append({"prompt": question, "answer": answer, "domain": domain})
        if len(found) == count:
            return found
    raise ValueError(f"{domain} gave only {len(found)} of {count} rows that are short enough.")


def reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where a completion is the answer, else 0."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def templates(domains: Sequence[str]) -> list[str]:
    """The fixed text around each domain's numbers or words, longest first."""
    found: set[str] = set()
    for domain in domains:
        questions = [row["prompt"] for row in rows(domain, 40, seed=12345)]
        found |= {piece for piece in (_prefix(questions), _prefix([q[::-1] for q in questions])[::-1]) if piece}
        # Between two numbers: ", " or " * " stays apart, it is short.
    return sorted(found, key=len, reverse=True)


def _prefix(texts: Sequence[str]) -> str:
    shortest, longest = min(texts), max(texts)
    size = next((i for i, c in enumerate(shortest) if c != longest[i]), len(shortest))
    return shortest[:size].rstrip("0123456789") if size else ""
