"""A trainer's rows on their way through it: each keeps its domain, and the guard sees what comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interference_guard.guard import Guard

from .completions import generated, labelled
from .rows import DomainTable
from .seams import Seams

DOMAIN_ID = "domain_id"


class PassingRows:
    """Follows the domain of every row through one trainer's own methods.

    Args:
        seams: The trainer's methods, to be wrapped.
        guard: Retains the completions.
        domains: Numbers the domains.
    """

    def __init__(self, seams: Seams, guard: Guard, domains: DomainTable) -> None:
        self.trainer, self.generates = seams.trainer, seams.generates
        self.guard, self.domains = guard, domains
        self._rewards: Tensor | None = None
        self._counts: dict[str, int] = {}
        self._evaluated: dict[str, list[float]] = {}
        seams.wrap("_prepare_inputs", self._prepare_inputs)
        if self.generates:
            seams.wrap("_generate_and_score_completions", self._generate)
            seams.wrap("_calculate_rewards", self._calculate)
        else:
            # A collator is the last to see whole rows.
            seams.wrap("_set_signature_columns_if_needed", self._keep_column)
            seams.wrap("data_collator", self._collate)

    def take_counts(self) -> dict[str, int]:
        """Rows of each domain that training steps took on this rank since the last call."""
        found, self._counts = self._counts, {}
        return found

    def take_evaluation(self) -> dict[str, float]:
        """Mean reward by domain of the rows evaluated since the last call, over all ranks."""
        found, self._evaluated = self._evaluated, {}
        return {name: sum(rewards) / len(rewards) for name, rewards in found.items()}

    def _keep_column(self, method: Any) -> Any:
        def keep() -> None:
            method()
            columns = self.trainer._signature_columns
            if self.domains.column not in columns:
                self.trainer._signature_columns = [*columns, self.domains.column]

        return keep

    def _collate(self, collator: Any) -> Any:
        def collate(rows: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
            numbers = self.domains.numbers(rows)
            column = self.domains.column
            bare = [{key: value for key, value in row.items() if key != column} for row in rows]
            batch = collator(bare, *args, **kwargs)
            batch[DOMAIN_ID] = numbers
            return batch

        return collate

    def _calculate(self, method: Any) -> Any:
        def calculate(inputs: Any, prompts: Any, *args: Any, **kwargs: Any) -> Tensor:
            every: Tensor = method(inputs, prompts, *args, **kwargs)
            weights = self.trainer.reward_weights.to(every.device).unsqueeze(0)
            total = (every * weights).nansum(dim=1)
            total[every.isnan().all(dim=1)] = torch.nan
            # The trainer gathers rewards over ranks; the first axis is ordered by rank.
            start = self.trainer.accelerator.process_index * len(prompts)
            self._rewards = total[start : start + len(prompts)]
            return every

        return calculate

    def _generate(self, method: Any) -> Any:
        def generate(inputs: list[dict[str, Any]]) -> dict[str, Any]:
            numbers = self._number(inputs)
            output: dict[str, Any] = method(inputs)
            rewards, self._rewards = self._rewards, None
            if self.trainer.model.training:
                self._retain(output, rewards, numbers)
            elif rewards is not None:
                self._note_evaluation(rewards, numbers)
            return {**output, DOMAIN_ID: numbers}

        return generate

    def _prepare_inputs(self, method: Any) -> Any:
        def prepare(batch: Any) -> Any:
            inputs = method(batch)
            if not isinstance(inputs, Mapping) or DOMAIN_ID not in inputs:
                return inputs
            # A copy: the trainer reuses buffered batches over several iterations.
            inputs = dict(inputs)
            numbers = inputs.pop(DOMAIN_ID)
            if self.trainer.model.training:
                for name, count in self.domains.counts(numbers.cpu()).items():
                    self._counts[name] = self._counts.get(name, 0) + count
                if not self.generates:
                    self._retain_labelled(inputs, numbers.cpu())
            return inputs

        return prepare

    def _number(self, rows: list[dict[str, Any]]) -> Tensor:
        if self.trainer.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            # A streaming dataset shows new names at different times on different ranks.
            fresh = [row.get(self.domains.column) for row in rows]
            self.domains.add(sorted({name for name in gather_object(fresh) if isinstance(name, str) and name}))
        return self.domains.numbers(rows)

    def _retain(self, output: Mapping[str, Any], rewards: Tensor | None, numbers: Tensor) -> None:
        rows = generated(output, rewards)
        for name in self.domains.counts(numbers):
            chosen = numbers == self.domains.names.index(name)
            if rewards is not None:
                chosen = chosen & rewards.isfinite().cpu()
            self.guard.retain(name, rows.rows(chosen.to(rows.input_ids.device)))

    def _retain_labelled(self, batch: Mapping[str, Any], numbers: Tensor) -> None:
        rows = labelled(batch)
        if rows is None or len(rows) != len(numbers):
            return
        for name in self.domains.counts(numbers):
            chosen = numbers == self.domains.names.index(name)
            self.guard.retain(name, rows.rows(chosen.to(rows.input_ids.device)))

    def _note_evaluation(self, rewards: Tensor, numbers: Tensor) -> None:
        accelerator = self.trainer.accelerator
        values, names = rewards, numbers.to(rewards.device)
        if accelerator.num_processes > 1:
            values, names = accelerator.gather(values), accelerator.gather(names)
        for number, value in zip(names.tolist(), values.tolist(), strict=True):
            if math.isfinite(value):
                self._evaluated.setdefault(self.domains.names[number], []).append(value)
