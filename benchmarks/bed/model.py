"""The bed's policy: a tiny Qwen3 from its config, a BPE tokenizer, and a warm start by noisy SFT."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .beds import GYM, Bed
from .domains import reward

PAD, END = "<pad>", "<end>"


def tokenizer(names: Sequence[str], bed: Bed = GYM) -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on the prompts: fixed phrases become few tokens, all else single characters."""
    phrases = "|".join(re.escape(text) for text in bed.templates(names))
    bpe = Tokenizer(BPE(unk_token=PAD))
    bpe.pre_tokenizer = Split(Regex(f"{phrases}|(?m:.)"), "isolated")
    texts = [row["prompt"] + row["answer"] for name in names for row in bed.rows(name, 300, seed=54321)]
    alphabet = sorted({character for text in texts for character in text})
    trainer = BpeTrainer(
        vocab_size=4000,
        special_tokens=[PAD, END],
        initial_alphabet=alphabet,
        min_frequency=50,
        show_progress=False,
        max_token_length=400,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build(words: PreTrainedTokenizerFast, seed: int, hidden: int = 64, layers: int = 2) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def warm_start(
    model: Qwen3ForCausalLM,
    words: PreTrainedTokenizerFast,
    names: Sequence[str],
    seed: int,
    steps: int | None = None,
    noise: float = 0.4,
    rate: float = 2e-3,
    batch: int = 128,
    clean: Sequence[str] = (),
    bed: Bed = GYM,
) -> None:
    """Supervised steps on all domains with wrong answers mixed in, so that RL has something left to teach.

    Domains named in `clean` get right answers alone.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = bed.warm_steps if steps is None else steps
    data = {name: bed.rows(name, 2000, seed=seed + 1) for name in names}
    examples = []
    for name, rows in data.items():
        for row in rows:
            wrong = rows[int(torch.randint(len(rows), (), generator=generator))]
            noisy = bool(torch.rand((), generator=generator) < noise) and name not in clean
            examples.append(
                (words(row["prompt"]).input_ids, words((wrong if noisy else row)["answer"]).input_ids)
            )
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1, pct_start=0.1)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(examples), (batch,), generator=generator).tolist()
        pairs = [examples[i] for i in chosen]
        width = max(len(prompt) + len(answer) + 1 for prompt, answer in pairs)
        ids = torch.full((batch, width), words.pad_token_id)
        labels = torch.full((batch, width), -100)
        mask = torch.zeros(batch, width, dtype=torch.int64)
        for i, (prompt, answer) in enumerate(pairs):
            row = torch.tensor([*prompt, *answer, words.eos_token_id])
            ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
            labels[i, -len(answer) - 1 :] = row[len(prompt) :]
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def pass_rates(
    model: Any,
    words: PreTrainedTokenizerFast,
    tests: Mapping[str, Sequence[Mapping[str, str]]],
    seed: int = 0,
    longest: int = 6,
) -> dict[str, float]:
    """Sampled pass rate of each domain; the global random generator is left as it was."""
    rows = [row for test in tests.values() for row in test]
    inputs = words(
        [row["prompt"] for row in rows], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=longest
        )
    model.train(training)
    texts = words.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = reward(texts, [row["answer"] for row in rows])
    result, start = {}, 0
    for name, test in tests.items():
        result[name] = sum(scores[start : start + len(test)]) / len(test)
        start += len(test)
    return result
