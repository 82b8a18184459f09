"""One run of a bed: GRPO through the real trainer, plain, guarded, mixed or by a rival."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import PreTrainedTokenizerFast, PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from . import domains
from . import model as policy
from .beds import GYM, Bed, named
from .method import METHODS, Method, Mixed
from .quiet import QUIET
from .run import Result, Run, Watch
from .watching import Evaluate, save

GENERATIONS = 8
PROMPTS, LONGEST = GYM.prompts, GYM.longest

_STARTS: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}


def prepare(
    order: Sequence[str], seed: int, clean: Sequence[str] = (), bed: Bed = GYM
) -> tuple[Any, PreTrainedTokenizerFast]:
    """The warm-started model and its tokenizer; made once per set of domains and seed."""
    names = sorted(order)
    words = policy.tokenizer(names, bed)
    student = policy.build(words, seed, bed.hidden)
    key = (bed.name, *names, seed, *clean)
    if key not in _STARTS:
        policy.warm_start(student, words, names, seed, clean=clean, bed=bed)
        _STARTS[key] = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    # A fresh model each time: TRL binds a forward to the instance it is given.
    student.load_state_dict(_STARTS[key])
    return student, words


def share_start(order: Sequence[str], seed: int, path: Path, save: bool, bed: Bed = GYM) -> None:
    """Write the warm start to a file, or take it from there instead of making it again."""
    key = (bed.name, *sorted(order), seed)
    if save:
        prepare(order, seed, bed=bed)
        torch.save(_STARTS[key], path)
    else:
        _STARTS[key] = torch.load(path, weights_only=True)


def train(
    run: Run,
    watch: Watch = lambda kind, step, values: None,
    every: int = 20,
    keep: Path | None = None,
    method: Method | None = None,
) -> Result:
    """Run it.

    Args:
        run: What to run.
        watch: Called after each step with `"step"` or `"rates"`, the step and the pass rates.
        every: Steps between two evaluations; each phase's length should be a multiple.
        keep: A folder for the run's history, and a checkpoint with the guard's state after every phase
            (`phase-0` is the warm start); nothing is kept by default.
        method: How; by default what `run.method` names.
    """
    bed = named(run.bed)
    method = METHODS[run.method](run) if method is None else method
    student, words = prepare(run.names, run.seed, () if run.reference is None else (run.reference,), bed)
    tests = {name: bed.rows(name, run.tests, 10_000, test=True) for name in run.names}
    plans = method.plan({name: bed.rows(name, 1000, 20_000 + run.seed) for name in run.order})
    result = Result(run=asdict(run))
    result.start = policy.pass_rates(student, words, tests, longest=bed.longest)
    result.curve.append({"step": 0, **result.start})
    if keep is not None:
        save(keep / "phase-0", student, None)
    disable_progress_bars()
    disable_progress_bar()
    done = 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in plans:
            steps = len(data) // bed.prompts
            args = _arguments(run, bed, str(keep or folder), steps, method.arguments())
            student = method.policy(student, Path(folder) / "start")
            trainer = GRPOTrainer(student, domains.reward, args, train_dataset=data, processing_class=words)
            method.attach(trainer, result)
            evaluate = Evaluate(words, tests, every, result, watch, method.callback, keep, bed.longest, done)
            trainer.add_callback(evaluate)
            trainer.remove_callback(PrinterCallback)
            started = time.perf_counter()
            trainer.train()
            result.seconds += time.perf_counter() - started - evaluate.seconds
            student = method.release(student)
            done += steps
    for index, name in enumerate(run.order):
        at = done if isinstance(method, Mixed) else (index + 1) * run.steps
        result.own[name] = next(point[name] for point in result.curve if point["step"] == at)
    result.final = {name: result.curve[-1][name] for name in run.order}
    result.method_seconds, result.method_bytes = method.seconds, method.bytes()
    if method.callback is not None and method.callback.guard is not None:
        result.guard_seconds = dict(method.callback.guard.clock.seconds)
    return result


def _arguments(run: Run, bed: Bed, folder: str, steps: int, other: dict[str, Any]) -> GRPOConfig:
    return GRPOConfig(
        **{
            "output_dir": folder,
            "learning_rate": run.rate,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": bed.prompts * GENERATIONS,
            "num_generations": GENERATIONS,
            "max_completion_length": bed.longest,
            "max_steps": steps,
            "shuffle_dataset": False,
            "beta": 0.0,
            "temperature": 1.0,
            "seed": run.seed,
            "logging_steps": 5,
            **QUIET,
            "log_level": "error",
            **other,
        }
    )
