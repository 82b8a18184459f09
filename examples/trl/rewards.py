"""Rule-based rewards of the example runs; each sees the rows of its own domain alone."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

CODE_SECONDS = 4


def text_of(completion: Any) -> str:
    """A completion's text; conversational ones are lists of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_answer(text: str) -> str:
    """What follows the last 'Answer:', or stands in the last box, or the last line."""
    text = text.rpartition("</think>")[2]
    boxed = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    if boxed:
        return boxed[-1]
    found = re.findall(r"[Aa]nswer\s*(?:is)?\s*:?\s*(.+)", text)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return found[-1] if found else (lines[-1] if lines else "")


def normal(answer: str) -> str:
    """An answer without spaces, dollars, points at the end and capitals."""
    return re.sub(r"[\s$]|\\text|\\,|\\!", "", answer).strip(".{}()").lower()


def exact_match(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the final answer is the row's answer."""
    found = (normal(final_answer(text_of(item))) for item in completions)
    return [float(mine == normal(str(right))) for mine, right in zip(found, answer, strict=True)]


def choice(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the first letter of the final answer is the row's letter."""
    found = (re.search(r"\b([A-J])\b", final_answer(text_of(item))) for item in completions)
    return [float(bool(mine) and mine[1] == right) for mine, right in zip(found, answer, strict=True)]


def tests_pass(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the program in the last code block passes the row's tests.

    The programs run as your user, with a time limit and nothing else: use a container or a sandbox.
    """
    return [
        float(_passes(_program(text_of(item)), tests)) for item, tests in zip(completions, answer, strict=True)
    ]


def _program(text: str) -> str:
    blocks = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else ""


def _passes(program: str, tests: str) -> bool:
    if not program:
        return False
    cases = json.loads(tests)
    if isinstance(cases, dict):
        cases = [{"input": a, "output": b} for a, b in zip(cases["inputs"], cases["outputs"], strict=True)]
    for case in cases:
        try:
            run = subprocess.run(
                [sys.executable, "-I", "-c", program],
                input=str(case["input"]),
                capture_output=True,
                text=True,
                timeout=CODE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        if run.returncode or run.stdout.split() != str(case["output"]).split():
            return False
    return True


def prose(completions: Sequence[Any], **columns: Any) -> list[float]:
    """From 0 to 1: length near 300 to 900 words, few repeated phrases, sentences that end.

    Rules cannot judge writing; these keep it from collapsing. Put a reward model here for more.
    """
    return [_prose(text_of(item).rpartition("</think>")[2]) for item in completions]


def _prose(text: str) -> float:
    words = text.split()
    if len(words) < 20:
        return 0.0
    length = min(len(words) / 300, 1.0, 900 / len(words))
    phrases = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    fresh = len(set(phrases)) / len(phrases)
    ends = float(text.rstrip()[-1] in ".!?\"'")
    return round(length * fresh * (0.7 + 0.3 * ends), 4)
