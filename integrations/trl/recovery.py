"""Rows for recovery phases: chosen the same on every rank, put in place of the planned ones at the next step."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

from interference_guard.errors import ConfigError, HostError, UnsupportedError
from interference_guard.telling import warn

from .rows import read_column
from .seams import generates


class RecoveryRows:
    """Rows of each domain that a recovery phase can train.

    Args:
        trainer: The trainer; it must generate.
        column: The domain's column.
        given: Rows by domain; the training set's own rows of a domain by default.

    Raises:
        UnsupportedError: If the trainer does not generate.
        HostError: If the training set cannot be searched and no rows are given, or rows lack a column.
        ConfigError: If a domain has no rows, or given rows are of another one.
    """

    def __init__(self, trainer: Any, column: str, given: Mapping[str, Any] | None = None) -> None:
        if not generates(trainer):
            raise UnsupportedError(
                f"{type(trainer).__name__} does not generate completions, so a recovery phase has no rewards to "
                "end by. Use recovery=False with it, or a GRPOTrainer or RLOOTrainer."
            )
        self.trainer, self.column, self.given = trainer, column, given
        # Kept, to know whether the trainer still has it.
        self.training = training = trainer.train_dataset
        searchable = hasattr(training, "select") and column in (training.column_names or ())
        needed = set(training.column_names or ()) - {column}
        self.rows: dict[str, Any] = {}
        # Without the columns that the trainer removes, of domains that have recovered.
        self._used: dict[str, Any] = {}
        if given is None and not searchable:
            raise HostError(
                "The training dataset is a stream, which cannot be searched for the rows of one domain. Give "
                "recovery_datasets={domain: dataset}, or use recovery=False."
            )
        if searchable:
            places: dict[str, list[int]] = {}
            for index, name in enumerate(read_column(training, column)):
                places.setdefault(name, []).append(index)
            self.rows = {name: training.select(indices) for name, indices in places.items()}
        # Of a stream they are not known.
        self._planned = frozenset(self.rows) if searchable else None
        # Nothing but its key says which domain such rows are of.
        self._unlabelled: set[str] = set()
        for name, rows in (given or {}).items():
            if not hasattr(rows, "column_names") or not hasattr(rows, "__len__"):
                raise ConfigError(
                    f"recovery_datasets[{name!r}] is a {type(rows).__name__}; it must be a datasets.Dataset, "
                    "whose rows can be drawn by their number."
                )
            if not len(rows):
                raise ConfigError(
                    f"recovery_datasets[{name!r}] has no rows. Give at least one, or leave the domain out."
                )
            absent = sorted(needed - set(rows.column_names))
            if absent:
                raise HostError(
                    f"recovery_datasets[{name!r}] lacks the columns {absent} of the training dataset, which "
                    f"reward functions may read; it has {sorted(rows.column_names)}. Add them."
                )
            if column in rows.column_names:
                _check_domain(name, rows, column)
            else:
                self._unlabelled.add(name)
            self.rows[name] = rows

    def renewed(self) -> RecoveryRows:
        """Rows for the training set that the trainer has now; this object, where it is still the same set.

        Raises:
            HostError: If that cannot be searched and no rows are given, or given rows lack one of its columns.
        """
        if self.trainer.train_dataset is self.training:
            return self
        return RecoveryRows(self.trainer, self.column, self.given)

    @property
    def domains(self) -> frozenset[str]:
        """Domains that can recover."""
        return frozenset(self.rows)

    def look_for(self, trained: Iterable[str]) -> None:
        """Warn of domains that were trained before and have no rows here, and of rows that no domain takes."""
        known = set(trained)
        if absent := sorted(known - self.domains):
            warn(
                f"recovery=True, and the training dataset has no rows of {absent}, which were trained before: "
                "what they lose cannot be recovered. Give recovery_datasets={domain: dataset}."
            )
        if self._planned is None:
            return
        if unknown := sorted(self._unlabelled - self._planned - known):
            warn(
                f"recovery_datasets has rows for {unknown}, and the domains of this run and of those before are "
                f"{sorted(self._planned | known)}: no recovery takes those rows. Correct the name, unless it is "
                "that of a domain that a later phase trains."
            )

    def batches(self, domain: str, planned: list[Any]) -> list[Any]:
        """Micro-batches of a domain's rows in the shape of the planned ones.

        Which rows they are depends on the seed and the number of the generation alone, so all ranks, and a
        resumed run, choose the same.
        """
        trainer = self.trainer
        if domain not in self._used:
            self._used[domain] = trainer._remove_unused_columns(self.rows[domain], "recovery")
        rows = self._used[domain]
        args = trainer.args
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        generations = trainer.num_generations
        span = args.steps_per_generation * trainer.num_iterations
        found = []
        for index, batch in enumerate(planned):
            # Micro-batches of one generation repeat its rows, as the trainer's own sampler does.
            generation = (trainer.state.global_step * args.gradient_accumulation_steps + index) // span
            draw = random.Random(f"{args.seed}/{domain}/{generation}")
            size = len(batch)
            picks = [draw.randrange(len(rows)) for _ in range(-(-size * world // generations))]
            places = [picks[(rank * size + place) // generations] for place in range(size)]
            found.append([{**rows[place], self.column: domain} for place in places])
        return found


def _check_domain(name: str, rows: Any, column: str) -> None:
    """Raise `ConfigError` where rows that are given for a domain say that they are of another one."""
    labels = read_column(rows, column)
    others = [index for index, label in enumerate(labels) if label != name]
    if others:
        raise ConfigError(
            f"{len(others)} of the {len(labels)} rows of recovery_datasets[{name!r}] are not of that domain: row "
            f"{others[0]} has {column}={labels[others[0]]!r}. A recovery would train them as {name!r}. Leave "
            "them out, or give them under their own domain."
        )
