"""What the CPU runs train: a tiny warm-started Qwen3 with a tokenizer, and rows of reasoning-gym domains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from benchmarks.bed import domains, model

END = "<|im_end|>"
# The prompt alone: the tiny model knows no roles.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tokenizer(names: Sequence[str]) -> PreTrainedTokenizerFast:
    """The bed's tokenizer with what veRL looks for in a Qwen model: an end of turn and a line break."""
    words = model.tokenizer(names)
    words.add_special_tokens({"eos_token": END})
    words.add_tokens(["\n"])
    words.chat_template = TEMPLATE
    return words


def write_model(folder: Path, names: Sequence[str], seed: int, hidden: int = 64, warm: int = 800) -> None:
    """Write a model warm-started for `warm` supervised steps, and its tokenizer."""
    torch.set_num_threads(1)
    words = tokenizer(names)
    student = model.build(words, seed, hidden)
    if warm:
        model.warm_start(student, words, names, seed, steps=warm)
    words.save_pretrained(folder)
    student.save_pretrained(folder)
    GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id).save_pretrained(folder)


def write_rows(path: Path, names: Sequence[str], count: int, seed: int) -> None:
    """Write `count` rows of each domain, one domain after the other, as veRL reads them."""
    rows = [
        {
            "data_source": name,
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "ability": name,
            "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            "extra_info": {"index": index},
        }
        for name in names
        for index, row in enumerate(domains.rows(name, count, seed))
    ]
    pandas.DataFrame(rows).to_parquet(path)
