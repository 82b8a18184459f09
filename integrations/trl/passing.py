"""A trainer's rows on their way through it: each keeps its domain, and the guard sees what comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interference_guard.errors import HostError
from interference_guard.guard import Guard
from interference_guard.names import named
from interference_guard.telling import warn

from .collating import DOMAIN_ID, WIDTH, NamingCollator, unnamed, unpack
from .completions import generated, labelled, sampling_temperature
from .engines import reduce
from .evaluation import EvaluationRounds
from .rewards import without
from .rows import DomainTable, check_dataset, missing, numbered_ahead
from .seams import Seams


class PassingRows:
    """Follows the domain of every row through one trainer's own methods.

    Args:
        seams: The trainer's methods, to be wrapped.
        guard: Retains the completions.
        domains: Numbers the domains.
        rounds: Takes the rewards of evaluations.
    """

    def __init__(self, seams: Seams, guard: Guard, domains: DomainTable, rounds: EvaluationRounds) -> None:
        self.trainer, self.generates = seams.trainer, seams.generates
        self.guard, self.domains, self.rounds = guard, domains, rounds
        # What the domains were numbered by.
        self._dataset = self.trainer.train_dataset
        self._rewards: Tensor | None = None
        self._counts: dict[str, float] = {}
        self._added = self._told = False
        seams.wrap("_prepare_inputs", self._prepare_inputs)
        seams.wrap("_set_signature_columns_if_needed", self._keep_column)
        seams.afterwards(self._drop_column)
        if self.generates:
            seams.wrap("_generate_and_score_completions", self._generate)
            seams.wrap("_calculate_rewards", self._calculate)
        else:
            # A collator is the last to see whole rows.
            width = max([WIDTH, *(len(name.encode()) for name in domains.names)])
            strip = self.trainer.args.remove_unused_columns
            seams.wrap("data_collator", lambda collator: NamingCollator(collator, domains.column, width, strip))
            # A data loader that is running keeps it.
            naming = self.trainer.data_collator
            seams.afterwards(lambda: setattr(naming, "active", False))

    def begin(self) -> None:
        """A run begins: no row of it was seen yet, and none made before the guard was attached is used up.

        Raises:
            HostError: If the trainer has been given other rows since, which have no domains.
            MissingDomainError: If one of them has none.
        """
        if self.trainer.train_dataset is not self._dataset:
            # All ranks number new names in one order.
            check_dataset(self.trainer.train_dataset, self.domains)
            self._dataset = self.trainer.train_dataset
        self._counts = {}
        self.rounds.begin()
        buffered = getattr(self.trainer, "_buffered_inputs", None)
        if buffered and not all(DOMAIN_ID in batch for batch in buffered):
            self.trainer._buffered_inputs = None

    def take_counts(self) -> dict[str, float]:
        """Rows of each domain that training steps took on this rank since the last call.

        Each row of a generation counts as all of it on average: its steps take rows of it at random, and which
        domain a step trains must not depend on the draw.
        """
        found, self._counts = self._counts, {}
        return found

    def step_counts(self) -> dict[str, float]:
        """What `take_counts` returns, of all ranks; every rank calls it once a step.

        Raises:
            HostError: If the trainer's batches pass by all methods that are followed.
        """
        counts, accelerator = self.take_counts(), self.trainer.accelerator
        if accelerator.num_processes > 1:
            names = self.domains.names
            table = torch.tensor([float(counts.get(name, 0)) for name in names], device=accelerator.device)
            summed = reduce(table, "sum").tolist()
            counts = {name: count for name, count in zip(names, summed, strict=True) if count}
        if not counts:
            raise HostError(
                f"{type(self.trainer).__name__} trains batches that pass neither its data_collator nor its "
                "generation, so the guard sees no domain. Use GRPOTrainer, RLOOTrainer or SFTTrainer as they are."
            )
        return counts

    def _keep_column(self, method: Any) -> Any:
        def keep() -> None:
            method()
            columns = self.trainer._signature_columns
            if self.domains.column not in columns:
                self.trainer._signature_columns = [*columns, self.domains.column]
                self._added = True

        return keep

    def _drop_column(self) -> None:
        if self._added:
            columns = self.trainer._signature_columns or ()
            self.trainer._signature_columns = [name for name in columns if name != self.domains.column]

    def _calculate(self, method: Any) -> Any:
        def calculate(inputs: Any, prompts: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self._added:
                # It would not be there without the guard, and every column is handed over by name.
                inputs = without(self.trainer.reward_funcs, self.domains.column, inputs)
            every: Tensor = method(inputs, prompts, *args, **kwargs)
            weights = self.trainer.reward_weights.to(every.device).unsqueeze(0)
            total = (every * weights).nansum(dim=1)
            total[every.isnan().all(dim=1)] = torch.nan
            # RLOO alone has it, and takes clipped rewards for its steps and its evaluations; NaN stays NaN.
            if limits := getattr(self.trainer, "reward_clip_range", None):
                total = total.clamp(limits[0], limits[1])
            # The trainer gathers rewards over ranks; the first axis is ordered by rank.
            start = self.trainer.accelerator.process_index * len(prompts)
            self._rewards = total[start : start + len(prompts)]
            return every

        return calculate

    def _generate(self, method: Any) -> Any:
        def generate(inputs: list[dict[str, Any]]) -> dict[str, Any]:
            training = self.trainer.model.training
            numbers = self._number(inputs, needed=training)
            output: dict[str, Any] = method(inputs)
            rewards, self._rewards = self._rewards, None
            if training:
                self._retain(output, rewards, numbers)
            elif rewards is not None and self.rounds.open:
                self._note_evaluation(rewards, numbers)
            if not training:
                return output
            whole = torch.bincount(numbers, minlength=len(self.domains.names)).double() / len(numbers)
            return {**output, DOMAIN_ID: whole.expand(len(numbers), -1)}

        return generate

    def _prepare_inputs(self, method: Any) -> Any:
        def prepare(batch: Any) -> Any:
            inputs = method(batch)
            if not isinstance(inputs, Mapping) or DOMAIN_ID not in inputs:
                return inputs
            # A copy: the trainer reuses buffered batches over several iterations.
            inputs = dict(inputs)
            found = inputs.pop(DOMAIN_ID)
            if self.trainer.model.training:
                self._count(inputs, found)
            return inputs

        return prepare

    def _count(self, inputs: Mapping[str, Any], found: Tensor) -> None:
        if self.generates:
            # A stream may have shown further domains since this generation.
            rows = dict(zip(self.domains.names, found.sum(0).tolist(), strict=False))
        else:
            numbers = self._arrived(inputs, found)
            rows = dict(self.domains.counts(numbers))
            self._retain_labelled(inputs, numbers)
        for name, count in rows.items():
            if count:
                self._counts[name] = self._counts.get(name, 0.0) + count

    def _arrived(self, batch: Mapping[str, Any], table: Tensor) -> Tensor:
        column, names = self.domains.column, unpack(table)
        if "" in names:
            index, ids = names.index(""), batch.get("input_ids")
            text = ""
            if isinstance(ids, Tensor) and len(ids) == len(names):
                text = self.trainer.processing_class.decode(ids[index], skip_special_tokens=True)
            raise missing(column, index, unnamed(table[index]), {"text": text})
        return self._number([{column: name} for name in names])

    def _number(self, rows: list[dict[str, Any]], needed: bool = True) -> Tensor:
        several = self.trainer.accelerator.num_processes > 1
        names = [row.get(self.domains.column) for row in rows]
        if several and (self.generates or not numbered_ahead(self.trainer.train_dataset)):
            from accelerate.utils import gather_object

            # A streaming dataset shows new names at different times on different ranks.
            names = gather_object(names)
            self.domains.add(sorted(set(filter(named, names))))
        if needed:
            # Of all ranks' rows, so that none goes on alone.
            self.domains.check(names)
        return self.domains.numbers(rows, needed)

    def _retain(self, output: Mapping[str, Any], rewards: Tensor | None, numbers: Tensor) -> None:
        rows = generated(output, rewards, sampling_temperature(self.trainer))
        for name in self.domains.counts(numbers):
            chosen = numbers == self.domains.names.index(name)
            if rewards is not None:
                chosen = chosen & rewards.isfinite().cpu()
            self.guard.retain(name, rows.rows(chosen.to(rows.input_ids.device)))

    def _retain_labelled(self, batch: Mapping[str, Any], numbers: Tensor) -> None:
        rows = labelled(batch, len(numbers))
        if rows is None:
            return
        if len(rows) != len(numbers):
            self._tell_of_joined_rows(len(rows), len(numbers))
            return
        for name in self.domains.counts(numbers):
            chosen = numbers == self.domains.names.index(name)
            self.guard.retain(name, rows.rows(chosen.to(rows.input_ids.device)))

    def _tell_of_joined_rows(self, found: int, rows: int) -> None:
        if self._told:
            return
        self._told = True
        warn(
            f"The data_collator made {found} sequences of {rows} rows, so nothing tells which domain each is of. "
            "They are trained and not retained, and a domain that has no others is not measured. Use a collator "
            "that makes one sequence of each row."
        )

    def _note_evaluation(self, rewards: Tensor, numbers: Tensor) -> None:
        accelerator = self.trainer.accelerator
        values, names = rewards, numbers.to(rewards.device)
        if accelerator.num_processes > 1:
            values, names = accelerator.gather(values), accelerator.gather(names)
        for number, value in zip(names.tolist(), values.tolist(), strict=True):
            if number >= 0 and math.isfinite(value):
                self.rounds.note(self.domains.names[number], value)
