"""What the examples of the README and the guide take as given, small enough to run in a test.

A page names the prelude of a block in a comment above it: `<!-- example: trl -->`.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bed.quiet import QUIET

# Model names a reader would use, each replaced by the small model of the `trl` prelude.
MODEL_NAMES = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B-Base")
WORDS = [*"0123456789", "+", "=", "reverse", "a", "b", "c", "[PAD]", "[EOS]", "[UNK]"]
# Of the smallest Qwen3 that has all its parts.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def empty(folder: Path) -> dict[str, Any]:
    """A block that stands alone."""
    return {}


def torch_loop(folder: Path) -> dict[str, Any]:
    """`model`, `loss(batch)` and `stream`, which yields (domain, batch)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))

    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    batches = [(torch.randn(6, 8), torch.randint(4, (6,))) for _ in range(6)]
    stream = [("math" if step < 3 else "code", batch) for step, batch in enumerate(batches)]
    return {"torch": torch, "model": model, "loss": loss, "stream": stream}


def trl(folder: Path) -> dict[str, Any]:
    """`model` (a folder), `reward_funcs`, `args` and `dataset`, whose rows carry a domain."""
    from datasets import Dataset
    from trl import GRPOConfig

    sums = [(f"{a} + {b} =", str(a + b), "math") for a in range(3) for b in range(3)]
    words = [(f"reverse {x} {y}", f"{y} {x}", "words") for x in "abc" for y in "abc"]
    rows = [dict(zip(("prompt", "answer", "domain"), row, strict=True)) for row in [*sums, *words]]

    def matches(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        # A random model hardly ever answers right, and rewards that are all alike give no gradients.
        return [float(right in text) + 0.01 * len(text) for text, right in zip(completions, answer, strict=True)]

    args = GRPOConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        max_steps=8,
        shuffle_dataset=False,
        logging_steps=1,
        **QUIET,
    )
    return {
        "model": str(small_model(folder / "model")),
        "reward_funcs": matches,
        "args": args,
        "dataset": Dataset.from_list(rows),
    }


def larger_batches(folder: Path) -> dict[str, Any]:
    """The same with four prompts in a batch, through all rows."""
    given = trl(folder)
    given["args"].per_device_train_batch_size = given["args"].generation_batch_size = 8
    given["args"].max_steps = 4
    return given


def sft(folder: Path) -> dict[str, Any]:
    """`model` (a folder), `args` and `dataset`, whose rows carry a completion and a domain."""
    from datasets import Dataset
    from trl import SFTConfig

    given = trl(folder)
    rows = [
        {"prompt": row["prompt"], "completion": f" {row['answer']}", "domain": row["domain"]}
        for row in given["dataset"]
    ]
    args = SFTConfig(
        output_dir=str(folder / "sft"),
        per_device_train_batch_size=3,
        num_train_epochs=1,
        **QUIET,
    )
    return {"model": given["model"], "args": args, "dataset": Dataset.from_list(rows)}


def second_run(folder: Path) -> dict[str, Any]:
    """What `trl` gives, its rows of `words` alone, and a first run on `math` that was saved."""
    from trl import GRPOTrainer

    from interference_guard import GuardConfig
    from interference_guard.integrations.trl import InterferenceGuardCallback

    given = trl(folder)
    math, words = (
        given["dataset"].filter(lambda row, domain=domain: row["domain"] == domain)
        for domain in ("math", "words")
    )
    trainer = GRPOTrainer(given["model"], given["reward_funcs"], given["args"], train_dataset=math)
    callback = InterferenceGuardCallback(trainer, GuardConfig())
    trainer.add_callback(callback)
    trainer.train()
    saved = folder / "run1/checkpoint-100"
    trainer.save_model(str(saved))
    callback.guard.save(saved)
    return {
        **given,
        "dataset": words,
        "GRPOTrainer": GRPOTrainer,
        "GuardConfig": GuardConfig,
        "InterferenceGuardCallback": InterferenceGuardCallback,
    }


def plain_run(folder: Path) -> dict[str, Any]:
    """What `trl` gives, its rows as `ordered`, and checkpoints of a run that was not guarded."""
    from trl import GRPOTrainer

    from interference_guard import GuardConfig
    from interference_guard.integrations.trl import (
        InterferenceGuardCallback,
        order_by_domain,
        prompts_per_generation,
    )

    given = trl(folder)
    args = given["args"]
    ordered = order_by_domain(given["dataset"], prompts_per_generation(args))
    args.save_strategy, args.save_steps = "steps", 2
    GRPOTrainer(given["model"], given["reward_funcs"], args, train_dataset=ordered).train()
    return {
        **given,
        "ordered": ordered,
        "GRPOTrainer": GRPOTrainer,
        "GuardConfig": GuardConfig,
        "InterferenceGuardCallback": InterferenceGuardCallback,
    }


def checkpoints(folder: Path) -> dict[str, Any]:
    """The folders `run/after-math` and `run/final` of a guarded loop, each with weights and the guard's state."""
    from safetensors.torch import save_file

    from interference_guard import Guard, GuardConfig, GuardedOptimizer

    names = torch_loop(folder)
    model = names["model"]
    guard = Guard(model, GuardConfig())
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), guard)
    for step, (domain, batch) in enumerate(names["stream"]):
        with guard.domain(domain), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No completions of domain")
            names["loss"](batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step in (2, 5):
            saved = folder / "run" / ("after-math" if step == 2 else "final")
            guard.save(saved)
            save_file(model.state_dict(), saved / "model.safetensors")
    return {}


def small_model(folder: Path) -> Path:
    """A random two-layer Qwen3 with a word tokenizer, saved so that a trainer can load it by path."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(WORDS),
        **SIZES,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=WORDS.index("[PAD]"),
        eos_token_id=WORDS.index("[EOS]"),
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


PRELUDES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "empty": empty,
    "torch": torch_loop,
    "trl": trl,
    "larger batches": larger_batches,
    "sft": sft,
    "second run": second_run,
    "plain run": plain_run,
    "checkpoints": checkpoints,
}
