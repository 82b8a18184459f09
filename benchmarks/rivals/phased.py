"""What most rivals need: to be told where phases begin and end, and when the optimizer has stepped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from interference_guard.innermost import innermost
from interference_guard.integrations.trl.seams import Seams

from ..bed.method import Method
from ..bed.run import Result

# Of what the trainer makes of a batch: all with one row a completion.
KEPT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


class Phased(Method):
    """A method with a part of its own in every phase; it works on the trainer it is attached to."""

    trainer: Any

    def attach(self, trainer: Any, result: Result) -> None:
        self.trainer = trainer
        trainer.add_callback(_Events(self))

    @property
    def model(self) -> nn.Module:
        """The policy."""
        model: nn.Module = self.trainer.model
        return model

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights with two axes, by name; tied ones once."""
        for name, parameter in self.model.named_parameters():
            if parameter.dim() == 2 and parameter.requires_grad:
                yield name, parameter.data

    def begin(self, phase: int) -> None:
        """Before the first step of a phase."""

    def end(self, phase: int) -> None:
        """After the last step of a phase."""

    def before_step(self) -> None:
        """Gradients are final, the weights unchanged."""

    def after_step(self) -> None:
        """The optimizer has changed the weights."""

    def timed(self, call: Callable[..., None], *values: int) -> None:
        """Call it, and count its time as the method's."""
        started = time.perf_counter()
        call(*values)
        self.seconds += time.perf_counter() - started


class Rollouts:
    """The latest generation batch of a trainer, as the trainer made it.

    Args:
        trainer: A `GRPOTrainer` that has not begun.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.latest: dict[str, Tensor] = {}
        self.rewards = torch.zeros(0)
        seams = Seams(trainer)
        seams.wrap("_generate_and_score_completions", self._generate)
        seams.wrap("_calculate_rewards", self._calculate)

    def _generate(self, method: Any) -> Any:
        def generate(inputs: Any) -> Any:
            output = method(inputs)
            self.latest = {name: output[name] for name in KEPT}
            self.latest["rewards"] = self.rewards
            return output

        return generate

    def _calculate(self, method: Any) -> Any:
        def calculate(*args: Any, **kwargs: Any) -> Any:
            every = method(*args, **kwargs)
            self.rewards = every.nansum(1)
            return every

        return calculate

    def log_probabilities(self, rows: dict[str, Tensor]) -> Tensor:
        """``(rows,)``: of each completion under the present weights, with a gradient."""
        ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1)
        mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1)
        length = rows["completion_ids"].shape[1]
        scores, *_ = self.trainer._get_per_token_logps_and_entropies(self.trainer.model, ids, mask, length)
        total: Tensor = (scores * rows["completion_mask"]).sum(1)
        return total


class _Events(TrainerCallback):
    def __init__(self, method: Phased) -> None:
        self.method, self.handle = method, None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        call = self.method
        self.handle = innermost(optimizer).register_step_post_hook(lambda *_: call.timed(call.after_step))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phase, place = divmod(state.global_step, self.method.run.steps)
        if place == 0:
            self.method.timed(self.method.begin, phase)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.method.timed(self.method.before_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phase, place = divmod(state.global_step, self.method.run.steps)
        if place == 0:
            self.method.timed(self.method.end, phase - 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.handle is not None:
            self.handle.remove()
