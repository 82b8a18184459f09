"""Real trainers over a tiny Qwen3, in seconds."""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from benchmarks.bed.quiet import QUIET
from interference_guard import GuardConfig
from interference_guard.integrations.trl import InterferenceGuardCallback
from tests.docs.preludes import small_model

CONFIG = GuardConfig(rank=4, sketch=8, residual=4, probe_steps=2, retain=16)
COMMON = QUIET | {
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}
TWO_PHASES = [("math", 6), ("code", 6)]
ACCUMULATION = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
SHAPES = {
    "plain": {},
    "accumulated": ACCUMULATION,
    "several steps a generation": {"steps_per_generation": 2, "generation_batch_size": None},
    "several iterations": {**ACCUMULATION, "num_iterations": 2},
}
_FOLDERS = {}


def known(folder):
    """Take a model that another process has written as it is."""
    _FOLDERS[folder] = None


class StopAt(TrainerCallback):
    """Stops a run after a step, as an interruption would; the trainer's own end stays."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def model_and_words(folder):
    if folder not in _FOLDERS:
        _FOLDERS[folder] = small_model(folder)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(
        folder
    )


def rows(blocks, column="domain"):
    """One row per prompt; `blocks` is a list of (domain, rows)."""
    found = []
    for domain, count in blocks:
        for index in range(count):
            prompt = f"{index % 7} + {index % 3} =" if domain == "math" else f"reverse {'abc'[index % 3]} a"
            found.append({"prompt": prompt, "answer": "1" if domain == "math" else "a", column: domain})
    return Dataset.from_list(found)


def reward(completions, answer, **columns):
    return [float(right in text) + 0.01 * len(text) for text, right in zip(completions, answer, strict=True)]


def online(kind, tmp_path, dataset, model=None, peft=None, evaluation=None, rewards=reward, **options):
    """A GRPO or RLOO trainer; one step is 2 prompts with 2 completions each, unless told otherwise."""
    start, words = model_and_words(tmp_path / "model")
    make_args, make = (GRPOConfig, GRPOTrainer) if kind == "grpo" else (RLOOConfig, RLOOTrainer)
    settings = {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 3,
        "shuffle_dataset": False,
        "max_steps": 6,
        **COMMON,
        **options,
    }
    return make(
        model if model is not None else start,
        rewards,
        args=make_args(**settings),
        train_dataset=dataset,
        eval_dataset=evaluation,
        processing_class=words,
        peft_config=peft,
    )


def supervised(tmp_path, dataset, evaluation=None, **options):
    start, words = model_and_words(tmp_path / "model")
    settings = {"output_dir": str(tmp_path / "sft"), "per_device_train_batch_size": 2, "max_steps": 6}
    args = SFTConfig(**(settings | COMMON | options))
    return SFTTrainer(start, args=args, train_dataset=dataset, eval_dataset=evaluation, processing_class=words)


def script(folder, domains, output="run", rows=4, **options):
    """Settings of the script that trains from a YAML file, over the model in the folder."""
    model_and_words(folder / "model")
    return {
        "model_name_or_path": str(folder / "model"),
        "dtype": "float32",
        "output_dir": str(folder / output),
        "per_device_train_batch_size": rows,
        "num_generations": 2,
        "max_completion_length": 3,
        "guard_rank": 4,
        "guard_sketch": 8,
        "domains": domains,
        **COMMON,
        **options,
    }


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def guarded(trainer, config=CONFIG):
    callback = InterferenceGuardCallback(trainer, config)
    trainer.add_callback(callback)
    return callback
