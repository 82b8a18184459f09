"""Writes one JSON lines file a domain, with `prompt` and `answer`, for the example runs.

    python examples/trl/prepare.py reasoning-gym --out data/reasoning_gym
    python examples/trl/prepare.py public --out data/public --writing NAME_OF_A_CREATIVE_WRITING_SET

The first makes its rows on the spot (`pip install reasoning-gym`), the second downloads data sets.

`public` takes the data sets that arXiv 2606.02398 names: OpenR1-Math, KlearReasoner-CodeSub-15K, SuperGPQA,
and creative writing prompts, up to 5,120 rows each, prompts of at most --characters.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

GYM = {
    "arithmetic": ("chain_sum", {"min_terms": 3, "max_terms": 5, "min_digits": 2, "max_digits": 3}),
    "words": ("spell_backward", {"min_word_len": 5, "max_word_len": 10}),
    "bits": ("count_bits", {"min_n": 1, "max_n": 4095}),
    "letters": ("letter_counting", {"min_words": 5, "max_words": 10}),
}
ASK = "Reason briefly, then end with a line 'Answer: ...'."
LETTERS = "ABCDEFGHIJ"


def reasoning_gym_rows(name: str, rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of one reasoning-gym domain."""
    import reasoning_gym

    task, settings = GYM[name]
    for item in reasoning_gym.create_dataset(task, size=rows, seed=seed, **settings):
        yield {"prompt": message(f"{item['question']}\n\n{ASK}"), "answer": str(item["answer"])}


def message(text: str) -> list[dict[str, str]]:
    """A conversational prompt."""
    return [{"role": "user", "content": text}]


def math_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """OpenR1-Math: `problem` and `answer`."""
    for row in rows:
        yield {
            "prompt": message(f"{row['problem']}\n\nPut the final answer in \\boxed{{}}."),
            "answer": row["answer"],
        }


def code_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """KlearReasoner-CodeSub: a conversational `prompt`, tests in `reward_model.ground_truth`."""
    for row in rows:
        tests = row["reward_model"]["ground_truth"]
        yield {"prompt": row["prompt"], "answer": tests if isinstance(tests, str) else json.dumps(tests)}


def qa_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """SuperGPQA: `question`, `options`, `answer_letter`."""
    for row in rows:
        options = "\n".join(f"{letter}) {text}" for letter, text in zip(LETTERS, row["options"], strict=False))
        prompt = f"{row['question']}\n\n{options}\n\n{ASK} Give the letter alone."
        yield {"prompt": message(prompt), "answer": row["answer_letter"]}


def writing_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Creative writing: the first user turn, whatever the column is called."""
    for row in rows:
        for name in ("prompt", "instruction", "input", "messages", "conversations"):
            found = row.get(name)
            if isinstance(found, list) and found:
                found = found[0].get("content") or found[0].get("value")
            if isinstance(found, str) and found.strip():
                yield {"prompt": message(found), "answer": ""}
                break
        else:
            raise SystemExit(f"No prompt in columns {sorted(row)}; add the right name to writing_rows().")


PUBLIC = {
    "math": ("open-r1/OpenR1-Math-220k", math_rows),
    "code": ("Kwai-Klear/KlearReasoner-CodeSub-15K", code_rows),
    "qa": ("m-a-p/SuperGPQA", qa_rows),
    "writing": (None, writing_rows),
}


def write(path: Path, rows: Iterable[dict[str, Any]], limit: int, characters: int) -> None:
    """Write the rows that are short enough, up to a limit."""
    short = (row for row in rows if sum(len(part["content"]) for part in row["prompt"]) <= characters)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        count = sum(bool(file.write(json.dumps(row, ensure_ascii=False) + "\n")) for row in islice(short, limit))
    print(f"{path}: {count} rows")


def main(arguments: list[str] | None = None) -> None:
    """Prepare one of the two sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("reasoning-gym", "public"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=5120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=8000, help="longest prompt; about 2,048 tokens")
    parser.add_argument("--writing", help="name of the creative writing data set, for 'public'")
    options = parser.parse_args(arguments)
    if options.kind == "reasoning-gym":
        for name in GYM:
            found = reasoning_gym_rows(name, options.rows, options.seed)
            write(options.out / f"{name}.jsonl", found, options.rows, options.characters)
        return
    from datasets import load_dataset

    if options.writing is None:
        parser.error("--writing NAME is needed: the data set of creative writing prompts")
    for name, (source, convert) in PUBLIC.items():
        data = load_dataset(source or options.writing, split="train", streaming=True)
        shuffled = data.shuffle(seed=options.seed, buffer_size=10_000)
        write(options.out / f"{name}.jsonl", convert(shuffled), options.rows, options.characters)


if __name__ == "__main__":
    main()
