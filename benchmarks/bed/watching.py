"""Callbacks that write down what happens in a run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, TrainerCallback

from interference_guard.integrations.trl import InterferenceGuardCallback
from interference_guard.measuring import look

from . import model as policy
from .run import Result, Watch


class Evaluate(TrainerCallback):
    """Tests the policy every so many steps, and sums up each phase."""

    def __init__(
        self,
        words: PreTrainedTokenizerFast,
        tests: Mapping[str, Any],
        every: int,
        result: Result,
        watch: Watch,
        guard: InterferenceGuardCallback | None,
        keep: Path | None = None,
        longest: int = 6,
        done: int = 0,
    ) -> None:
        self.words, self.tests, self.every, self.result, self.watch = words, tests, every, result, watch
        self.guard, self.keep, self.longest = guard, keep, longest
        # Steps of trainers before this one.
        self.done = done
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
        step = self.done + state.global_step
        if step % self.result.run["steps"] == 0:
            self._phase()
            if self.keep is not None:
                save(self.keep / f"phase-{step // self.result.run['steps']}", model, self.guard)
        if step % self.every == 0:
            started = time.perf_counter()
            rates = policy.pass_rates(model, self.words, self.tests, longest=self.longest)
            self.result.curve.append({"step": step, **rates})
            if self.guard is not None and self.guard.history is not None:
                self.guard.history.evaluation(step, rates)
            self.seconds += time.perf_counter() - started
            self.watch("rates", step, rates)
        else:
            self.watch("step", step, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        kept = {name: value for name, value in logs.items() if name.startswith("guard/")}
        if kept:
            self.result.metrics.append({"step": state.global_step, **kept})


def save(folder: Path, model: Any, guard: InterferenceGuardCallback | None) -> None:
    """Write a checkpoint, and the guard's state beside it."""
    model.save_pretrained(folder)
    if guard is not None and guard.guard is not None:
        guard.guard.save(folder)


class Pairs(TrainerCallback):
    """Writes down raw prediction against measurement of every protected domain."""

    def __init__(self, guard: InterferenceGuardCallback, every: int, result: Result) -> None:
        self.guard, self.every, self.result = guard.guard, every, result

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.guard is None or state.global_step % self.every:
            return
        for name, raw in self.guard.raw_parts(self.guard.protected).items():
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


class Recoveries(TrainerCallback):
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
