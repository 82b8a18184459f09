"""Rule-based rewards of the example runs; each sees the rows of its own domain alone."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CODE_SECONDS = 4


def text_of(completion: Any) -> str:
    """A completion's text; conversational ones are lists of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_answer(text: str) -> str:
    """What stands in the last box, or follows the last 'Answer:', or the last line."""
    text = text.rpartition("</think>")[2]
    boxed = _last_box(text)
    if boxed is not None:
        return boxed
    # Models make the word bold, or the answer.
    found = re.findall(r"[Aa]nswer[\s*]*(?:is\b)?[\s*]*:?[\s*]*(.+)", text)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return found[-1] if found else (lines[-1] if lines else "")


def _last_box(text: str) -> str | None:
    """What is in the last box that is closed; None without any."""
    box, begin = None, -1
    # Where each group that is open began, and whether it is a box.
    groups: list[tuple[int, bool]] = []
    # What follows another backslash, as in \{, opens and closes none.
    for found in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text):
        if found[0] == "}" and groups:
            start, is_box = groups.pop()
            if is_box and start > begin:
                box, begin = text[start : found.start()], start
        elif found[0][-1] == "{" and found[0] != r"\{":
            groups.append((found.end(), found[0] != "{"))
    return box


def normal(answer: str) -> str:
    """An answer without spaces, dollars, capitals, and points, brackets and asterisks around it."""
    return re.sub(r"[\s$]|\\text|\\,|\\!", "", answer).strip(".*{}()").lower()


def exact_match(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the final answer is the row's answer."""
    found = (normal(final_answer(text_of(item))) for item in completions)
    return [float(mine == normal(str(right))) for mine, right in zip(found, answer, strict=True)]


def choice(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the first letter of the final answer is the row's letter."""
    found = (re.search(r"\b([A-J])\b", final_answer(text_of(item))) for item in completions)
    return [float(bool(mine) and mine[1] == right) for mine, right in zip(found, answer, strict=True)]


def tests_pass(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the program in the last code block passes all of the row's tests, 0 where it has none.

    The programs run as your user, with a time limit and nothing else: use a container or a sandbox.

    Raises:
        ValueError: If a row's tests cannot be read.
    """
    rows = [(_program(text_of(item)), _cases(tests)) for item, tests in zip(completions, answer, strict=True)]
    return [float(_passes(program, cases)) for program, cases in rows]


def _program(text: str) -> str:
    blocks = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else ""


def _cases(tests: str) -> list[tuple[str, str]]:
    """Input and output of each test."""
    try:
        found = json.loads(tests)
        if isinstance(found, dict):
            return [(str(a), str(b)) for a, b in zip(found["inputs"], found["outputs"], strict=True)]
        return [(str(case["input"]), str(case["output"])) for case in found]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"answer={tests!r:.120} holds no tests ({type(error).__name__}: {error}). A row of this reward needs "
            'JSON, either {"inputs": [...], "outputs": [...]} of equal length or [{"input": ..., "output": ...}] '
            "with any number of tests. Correct the row, or give its domain another reward."
        ) from error


def _passes(program: str, cases: list[tuple[str, str]]) -> bool:
    # Without a test nothing is known of a program.
    if not program or not cases:
        return False
    with tempfile.TemporaryDirectory() as folder:
        # A file: an argument has a length limit. What cannot be encoded, half a surrogate pair, is no program.
        path = Path(folder) / "program.py"
        path.write_bytes(program.encode("utf-8", "replace"))
        return all(_answers(path, given) == wanted.split() for given, wanted in cases)


def _answers(path: Path, given: str) -> list[str] | None:
    """The words that a program writes for an input; None where it fails or takes too long."""
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-X", "utf8", path],
            input=given,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=CODE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return None if run.returncode else run.stdout.split()


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
