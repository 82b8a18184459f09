"""A trainer's rows on their way through it: each keeps its domain, and the guard sees what comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interference_guard.errors import HostError
from interference_guard.guard import Guard
from interference_guard.names import named
from interference_guard.telling import warn

from .collating import DOMAIN_ID, WIDTH, NamingCollator, unnamed, unpack
from .columns import DomainColumn
from .completions import generated, labelled, sampling_temperature
from .engines import reduce
from .evaluation import EvaluationRounds
from .pairing import NO_DOMAIN, Paired, Pairing
from .rows import DomainTable, check_dataset, numbered_ahead, packs
from .seams import Seams

# In place of a domain's name, which is never empty: of rows of which nothing tells the domain.
UNKNOWN = ""


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
        self._counts: dict[str, float] = {}
        self._told: set[str] = set()
        self.column = DomainColumn(seams, domains.column)
        seams.wrap("_prepare_inputs", self._prepare_inputs)
        if self.generates:
            words = getattr(self.trainer.processing_class, "tokenizer", self.trainer.processing_class)
            self._pairing = Pairing(words.pad_token_id)
            self._generating = False
            if hasattr(self.trainer, "_generate"):
                seams.wrap("_generate", self._sample)
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
            check_dataset(self.trainer.train_dataset, self.domains, packs(self.trainer))
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
            HostError: If the trainer's batches pass by all methods that are followed, or nothing tells the domain
                of some of their rows.
        """
        counts, accelerator = self.take_counts(), self.trainer.accelerator
        if accelerator.num_processes > 1:
            names = [UNKNOWN, *self.domains.names]
            table = torch.tensor([float(counts.get(name, 0)) for name in names], device=accelerator.device)
            summed = reduce(table, "sum").tolist()
            counts = {name: count for name, count in zip(names, summed, strict=True) if count}
        if UNKNOWN in counts:
            raise HostError(
                f"{type(self.trainer).__name__} trains rows of which nothing tells the domain: no completion of "
                "their prompts was scored in this run. Have _generate_and_score_completions return rows whose "
                "prompts were (begin a resumed run with an empty replay buffer), or train without the guard."
            )
        if not counts:
            raise HostError(
                f"{type(self.trainer).__name__} trains batches that pass neither its data_collator nor its "
                "generation, or of which the data_collator makes no mapping, so the guard sees no domain. Use "
                "GRPOTrainer, RLOOTrainer or SFTTrainer as they are."
            )
        return counts

    def _sample(self, method: Any) -> Any:
        def sample(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            if isinstance(made, tuple):
                # Whatever else there is, the ids of prompts and completions come first.
                self._pairing.made(*made[:2])
            return made

        return sample

    def _calculate(self, method: Any) -> Any:
        def calculate(inputs: Any, prompts: Any, completions: Any, ids: Any, *args: Any, **kwargs: Any) -> Tensor:
            handed = self.column.for_rewards(inputs)
            every: Tensor = method(handed, prompts, completions, ids, *args, **kwargs)
            weights = self.trainer.reward_weights.to(every.device).unsqueeze(0)
            total = (every * weights).nansum(dim=1)
            total[every.isnan().all(dim=1)] = torch.nan
            # RLOO alone has it, and takes clipped rewards for its steps and its evaluations; NaN stays NaN.
            if limits := getattr(self.trainer, "reward_clip_range", None):
                total = total.clamp(limits[0], limits[1])
            # The trainer gathers rewards over ranks; the first axis is ordered by rank.
            start = self.trainer.accelerator.process_index * len(prompts)
            names = [self.column.domain(row) for row in inputs]
            self._pairing.add(ids, self._known(names), total[start : start + len(prompts)])
            return every

        return calculate

    def _known(self, names: Sequence[object]) -> list[int]:
        """Numbers of the domains of rows that are scored, which an override may have drawn itself."""
        if self.trainer.accelerator.num_processes == 1:
            # New names of a stream. Several ranks would not number them alike.
            self.domains.add(sorted(set(filter(named, names))))
        places = {name: number for number, name in enumerate(self.domains.names)}
        return [places.get(name, NO_DOMAIN) if named(name) else NO_DOMAIN for name in names]

    def _generate(self, method: Any) -> Any:
        def generate(inputs: list[dict[str, Any]]) -> dict[str, Any]:
            if self._generating:
                # An override that generates again: what counts is what it returns in the end.
                again: dict[str, Any] = method(inputs)
                return again
            training = self.trainer.model.training
            numbers = self._number(inputs, needed=training)
            self._pairing.begin()
            self._generating = True
            try:
                output: dict[str, Any] = method(self.column.for_generation(inputs))
                paired = self._pairing.pair(output) if training or self.rounds.open else None
            finally:
                self._generating = False
                self._pairing.begin()
            if not training:
                if self.rounds.open:
                    self._note_evaluation(paired)
                return output
            self._retain(output, paired)
            if paired is not None:
                numbers = paired.numbers
            # The first is the share of rows that are of no known domain.
            found = torch.bincount(numbers + 1, minlength=len(self.domains.names) + 1).double() / len(numbers)
            return {**output, DOMAIN_ID: found.expand(len(output["completion_ids"]), -1)}

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
            rows = dict(zip((UNKNOWN, *self.domains.names), found.sum(0).tolist(), strict=False))
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
            raise self.domains.missing(unnamed(table[index]), {"text": text})
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
        elif self.rounds.open:
            self._tell_of_labels(names)
        return self.domains.numbers(rows, needed)

    def _tell_of_labels(self, names: Sequence[object]) -> None:
        """Say of rows of an evaluation that have a label and by it no domain, as numbers of a ClassLabel."""
        odd = next((name for name in names if name is not None and not isinstance(name, str)), None)
        if odd is not None:
            self._tell(
                "labels",
                f"Rows of an evaluation have {self.domains.column}={odd!r}, which is no string and so no domain: "
                "the guard ignores them, and their rewards correct no estimate. Write names there as in the "
                "training rows (numbers of a ClassLabel become names by its int2str).",
            )

    def _retain(self, output: Mapping[str, Any], paired: Paired | None) -> None:
        override = f"{type(self.trainer).__name__}._generate_and_score_completions"
        rows = generated(output, None if paired is None else paired.rewards, sampling_temperature(self.trainer))
        if paired is None:
            self._tell(
                "passed by",
                f"{override} computed no rewards by self._calculate_rewards(), from which the guard takes them. "
                "What it generates is trained and not retained, so its domains are not measured. Have it call "
                "that method of the trainer itself.",
            )
            return
        if not paired.scored.all():
            count = len(paired.scored) - int(paired.scored.sum())
            self._tell(
                "not scored",
                f"{override} returned {len(paired.scored)} rows, of which {count} are not among those that were "
                "scored by self._calculate_rewards() while it ran, so nothing tells their rewards. They are "
                "trained and not retained, and a domain that has no others is not measured. That is right for "
                "rows of a replay buffer; others must keep the ids of their prompts and completions.",
            )
        usable = paired.scored & paired.rewards.isfinite().cpu()
        for number in sorted(set(paired.numbers.tolist())):
            if number != NO_DOMAIN:
                chosen = usable & (paired.numbers == number)
                self.guard.retain(self.domains.names[number], rows.rows(chosen.to(rows.input_ids.device)))

    def _tell(self, trouble: str, message: str) -> None:
        if trouble not in self._told:
            self._told.add(trouble)
            warn(message)

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
        self._tell(
            "joined",
            f"The data_collator made {found} sequences of {rows} rows, so nothing tells which domain each is of. "
            "They are trained and not retained, and a domain that has no others is not measured. Use a collator "
            "that makes one sequence of each row.",
        )

    def _note_evaluation(self, paired: Paired | None) -> None:
        found: list[tuple[int, float]] = []
        if paired is not None:
            values = zip(paired.numbers.tolist(), paired.rewards.tolist(), paired.scored.tolist(), strict=True)
            found = [(number, value) for number, value, scored in values if scored and number != NO_DOMAIN]
        if self.trainer.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        for number, value in found:
            if math.isfinite(value):
                self.rounds.note(self.domains.names[number], value)
