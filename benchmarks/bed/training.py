"""One run of the bed: GRPO through the real trainer, plain, guarded or mixed."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from interference_guard import GuardConfig
from interference_guard.integrations.trl import InterferenceGuardCallback, order_by_domain
from interference_guard.measuring import look

from . import domains
from . import model as policy

PROMPTS, GENERATIONS, LONGEST = 32, 8, 6
TEST_ROWS = 256
Watch = Callable[[str, int, dict[str, float]], None]


@dataclass(frozen=True)
class Run:
    """What is run.

    Args:
        method: ``"plain"``, ``"guarded"``, ``"observed"`` (the guard predicts and measures only) or
            ``"mixed"`` (all domains in every batch, the same number of rollouts).
        rate: Learning rate of AdamW.
        seed: Of weights, data and sampling.
        order: Domains in the order they are trained.
        steps: Optimizer steps of each domain.
        guard: Settings of the guard that differ from the defaults.
        reference: A domain that the warm start teaches without noise and that is never trained afterwards; with
            `"guarded"` it is protected as a reference domain.
    """

    method: str
    rate: float
    seed: int
    order: tuple[str, ...]
    steps: int = 60
    guard: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All domains that are tested."""
        return self.order if self.reference is None else (*self.order, self.reference)


@dataclass
class Result:
    """What came out; pass rates are sampled on rows drawn apart from those trained on.

    Args:
        run: The run.
        curve: Per evaluation: step, and each domain's pass rate.
        own: Pass rate right after the domain's own phase.
        final: Pass rate at the end.
        start: Pass rate of the warm start.
        seconds: Wall-clock time of training without evaluations.
        guard_seconds: Time of the guard by part.
        phases: Per phase: its seconds without evaluations, and the guard's by part.
        metrics: The guard's metrics by step.
        pairs: With `"observed"`: step, domain, both parts of the raw prediction, their coefficients so far,
            measured loss and KL.
        recoveries: Per recovery phase: the step it ended at, its domain, the steps it took, those it was expected
            to take after its first, and whether the reward came back.
    """

    run: dict[str, Any]
    curve: list[dict[str, float]] = field(default_factory=list)
    own: dict[str, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    guard_seconds: dict[str, float] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    recoveries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def average(self) -> float:
        """Mean final pass rate."""
        return sum(self.final.values()) / len(self.final)

    @property
    def forgetting(self) -> float:
        """Mean of own minus final over all domains but the last, which nothing follows."""
        earlier = list(self.own)[:-1]
        return sum(self.own[name] - self.final[name] for name in earlier) / max(len(earlier), 1)

    @property
    def bwt(self) -> float:
        """Backward transfer (Lopez-Paz and Ranzato, 2017): the mean change after the own phase."""
        return -self.forgetting


class _Evaluate(TrainerCallback):  # type: ignore[misc]
    def __init__(
        self,
        words: PreTrainedTokenizerFast,
        tests: Mapping[str, Any],
        every: int,
        result: Result,
        watch: Watch,
        guard: InterferenceGuardCallback | None,
        keep: Path | None = None,
    ) -> None:
        self.words, self.tests, self.every, self.result, self.watch = words, tests, every, result, watch
        self.guard, self.keep = guard, keep
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        self.before: tuple[float, dict[str, float]] = (0.0, {})
        if self.guard is not None and self.guard.history is not None:
            self.guard.history.evaluation(0, self.result.start)

    def _phase(self) -> None:
        seconds = time.perf_counter() - self.started - self.seconds
        guard = dict(self.guard.guard.clock.seconds) if self.guard is not None and self.guard.guard else {}
        parts = {name: value - self.before[1].get(name, 0.0) for name, value in guard.items()}
        self.result.phases.append({"seconds": seconds - self.before[0], "guard": parts})
        self.before = (seconds, guard)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.result.run["steps"] == 0:
            self._phase()
            if self.keep is not None:
                _save(self.keep / f"phase-{state.global_step // self.result.run['steps']}", model, self.guard)
        if state.global_step % self.every == 0:
            started = time.perf_counter()
            rates = policy.pass_rates(model, self.words, self.tests, longest=LONGEST)
            self.result.curve.append({"step": state.global_step, **rates})
            if self.guard is not None and self.guard.history is not None:
                self.guard.history.evaluation(state.global_step, rates)
            self.seconds += time.perf_counter() - started
            self.watch("rates", state.global_step, rates)
        else:
            self.watch("step", state.global_step, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        kept = {name: value for name, value in logs.items() if name.startswith("guard/")}
        if kept:
            self.result.metrics.append({"step": state.global_step, **kept})


def _save(folder: Path, model: Any, guard: InterferenceGuardCallback | None) -> None:
    model.save_pretrained(folder)
    if guard is not None and guard.guard is not None:
        guard.guard.save(folder)


class _Pairs(TrainerCallback):  # type: ignore[misc]
    """Writes down raw prediction against measurement of every protected domain."""

    def __init__(self, guard: InterferenceGuardCallback, every: int, result: Result) -> None:
        self.guard, self.every, self.result = guard.guard, every, result

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.guard is None or state.global_step % self.every:
            return
        for name, raw in self.guard.interference(self.guard.protected).items():
            domain = self.guard.domains[name]
            # Without calibrating: the prediction must live on the probes that a user's run makes.
            found = look(self.guard, domain)
            quadratic, linear = domain.region.slopes
            self.result.pairs.append(
                {
                    "step": state.global_step,
                    "domain": name,
                    "raw": raw.quadratic,
                    "linear": raw.linear,
                    "slopes": [quadratic, linear],
                    "loss": found.loss,
                    "kl": found.kl,
                }
            )


class _Recoveries(TrainerCallback):  # type: ignore[misc]
    """Writes down every recovery phase that ends."""

    def __init__(self, guard: InterferenceGuardCallback, result: Result) -> None:
        self.guard, self.result, self.domain = guard.guard, result, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.guard is None:
            return
        schedule = self.guard.schedule
        if self.domain is not None and schedule.domain is None:
            self.result.recoveries.append(
                {
                    "step": state.global_step,
                    "domain": self.domain,
                    "taken": schedule.taken,
                    # JSON has no infinity: None says that the first step did not contract, or is unknown.
                    "expected": schedule.expected if math.isfinite(schedule.expected) else None,
                    "loss": schedule.loss,
                    "regained": schedule.regained,
                }
            )
        self.domain = schedule.domain


_STARTS: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}


def prepare(order: Sequence[str], seed: int, clean: Sequence[str] = ()) -> tuple[Any, PreTrainedTokenizerFast]:
    """The warm-started model and its tokenizer; made once per set of domains and seed."""
    names = sorted(order)
    words = policy.tokenizer(names)
    student = policy.build(words, seed)
    key = (*names, seed, *clean)
    if key not in _STARTS:
        policy.warm_start(student, words, names, seed, clean=clean)
        _STARTS[key] = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    # A fresh model each time: TRL binds a forward to the instance it is given.
    student.load_state_dict(_STARTS[key])
    return student, words


def share_start(order: Sequence[str], seed: int, path: Path, save: bool) -> None:
    """Write the warm start to a file, or take it from there instead of making it again."""
    key = (*sorted(order), seed)
    if save:
        prepare(order, seed)
        torch.save(_STARTS[key], path)
    else:
        _STARTS[key] = torch.load(path, weights_only=True)


def train(
    run: Run,
    watch: Watch = lambda kind, step, values: None,
    every: int = 20,
    keep: Path | None = None,
) -> Result:
    """Run it.

    Args:
        run: What to run.
        watch: Called after each step with ``"step"`` or ``"rates"``, the step and the pass rates.
        every: Steps between two evaluations; each phase's length should be a multiple.
        keep: A folder for the run's history, and a checkpoint with the guard's state after every phase
            (`phase-0` is the warm start); nothing is kept by default.
    """
    student, words = prepare(run.names, run.seed, () if run.reference is None else (run.reference,))
    tests = {name: domains.rows(name, TEST_ROWS, seed=10_000) for name in run.names}
    rows = [row for name in run.order for row in domains.rows(name, 1000, seed=20_000 + run.seed)]
    total = run.steps * len(run.order)
    data = Dataset.from_list(rows)
    if run.method == "mixed":
        mixture = torch.Generator().manual_seed(run.seed)
        data = data.select(torch.randint(len(rows), (total * PROMPTS,), generator=mixture).tolist())
    else:
        data = order_by_domain(data, PROMPTS, "sequential", batches=run.steps, seed=run.seed)
    result = Result(run=asdict(run))
    result.start = policy.pass_rates(student, words, tests, longest=LONGEST)
    result.curve.append({"step": 0, **result.start})
    if keep is not None:
        _save(keep / "phase-0", student, None)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = GRPOConfig(
            output_dir=str(keep or folder),
            learning_rate=run.rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=PROMPTS * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=LONGEST,
            max_steps=total,
            shuffle_dataset=False,
            beta=0.0,
            temperature=1.0,
            seed=run.seed,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            log_level="error",
        )
        trainer = GRPOTrainer(student, domains.reward, args, train_dataset=data, processing_class=words)
        guard = None
        if run.method in ("guarded", "observed"):
            settings = {"project": run.method == "guarded", "seed": run.seed, **run.guard}
            given = None
            if run.reference is not None:
                answers = domains.rows(run.reference, 512, seed=20_000 + run.seed)
                rows_given = [{"prompt": row["prompt"], "completion": row["answer"]} for row in answers]
                given = {run.reference: Dataset.from_list(rows_given)}
            guard = InterferenceGuardCallback(trainer, GuardConfig(**settings), reference=given)
            trainer.add_callback(guard)
        if guard is not None and run.method == "observed":
            trainer.add_callback(_Pairs(guard, 3, result))
        if guard is not None and guard.config.recovery:
            trainer.add_callback(_Recoveries(guard, result))
        evaluate = _Evaluate(words, tests, every, result, watch, guard, keep)
        trainer.add_callback(evaluate)
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        result.seconds = time.perf_counter() - started - evaluate.seconds
    for index, name in enumerate(run.order):
        at = total if run.method == "mixed" else (index + 1) * run.steps
        result.own[name] = next(point[name] for point in result.curve if point["step"] == at)
    result.final = {name: result.curve[-1][name] for name in run.order}
    if guard is not None and guard.guard is not None:
        result.guard_seconds = dict(guard.guard.clock.seconds)
    return result
