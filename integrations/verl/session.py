"""One guard beside one engine: what each mini-batch tells it, and what it gives back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric

from interference_guard.errors import HostError
from interference_guard.files import HISTORY
from interference_guard.guard import Guard
from interference_guard.history import History
from interference_guard.optimizer import attach
from interference_guard.probe import Completions, evenly
from interference_guard.recovering import abandon_unserved

from . import batch
from .checkpoints import Checkpoints
from .console import say
from .coordinator import Link
from .settings import RunSettings


class Session:
    """Observes, projects and measures inside an engine's steps, on all ranks alike.

    Args:
        engine: An engine that has been initialized.
        settings: Of the run.
        former: This rank's folder of the state that the run begins with, where no checkpoint of its own is read
            before its first step.

    Raises:
        UnsupportedError: If the model or the optimizer cannot be guarded.
    """

    def __init__(self, engine: Any, settings: RunSettings, former: Path | None = None) -> None:
        self.engine = engine
        self.settings = settings
        self.history: History | None = None
        self._began = 0.0
        self.group = engine.get_data_parallel_group()
        self.world = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self.temperature = math.nan
        self.fresh = batch.FreshRows()
        # Rows of all ranks in the present update, by domain.
        self._update: dict[str, float] = {}
        # Steps before this process's first one: later lines of a history are of a run that was cut off.
        self._start = 0
        self.link = Link() if settings.guard.recovery else None
        self.guard = Guard(
            engine.module, settings.guard, policy=self._scores, reduce=self._reduce if self.world > 1 else None
        )
        self.guard.keepers = self.world
        # The engine's forward pass sums over ranks even where each holds all weights (fsdp_size=1).
        self.guard.scores_together = self.world > 1
        if self.link is not None:
            self.guard.recoverable = self.link.domains()
        self.checkpoints = Checkpoints(self.guard, (self.rank, self.world), self._say, former)
        self.checkpoints.look(settings)
        self.hooks = attach(engine.optimizer, self.guard)
        self._introduce()

    # One update

    def expect(self, data: Any) -> None:
        """Look at the rows of an update before it is cut into mini-batches, and number them in place."""
        batch.number_rows(data)
        self._update = self._shares(_counts(self._labels(data)))

    def begin(self, data: Any) -> None:
        """Tell the guard what the coming step trains, and keep the rows that are new.

        Raises:
            StateError: If the state beside the last checkpoint could not be written, where the host's is
                complete; or if that of a former run cannot be read.
        """
        if self.checkpoints.begin():
            self._go_on()
        started = perf_counter()
        temperature = batch.temperature_of(data)
        self.temperature = self.temperature if temperature is None else temperature
        # Only now: it may score completions, for which the temperature must be known.
        abandon_unserved(self.guard)
        names = self._labels(data)
        new = self._new_rows(data, names)
        # A mini-batch trains what its update does, whichever of the rows it holds: veRL sorts them by length or
        # arrival, and some mini-batches are padding alone.
        shares = self._update or self._shares(_counts(names))
        self.guard.begin(shares or dict.fromkeys(self.guard.trained, 1.0))
        limit = self.guard.retain_here
        kept = {
            name: batch.completions(
                data, [rows[place] for place in evenly(len(rows), limit)], self.temperature
            ).to(self.guard.device)
            for name, rows in new.items()
        }
        self.guard.clock.add("retain", started)
        for name, rows in kept.items():
            self.guard.retain(name, rows)

    def end(self, data: Any, outputs: dict[str, Any]) -> None:
        """Measure the domains whose turn it is; at the end of an update add the guard's metrics to the engine's.

        An update uses its rollouts up, so that no recovery phase begins or ends within it.
        """
        over = bool(tu.get(data, "update_lr_scheduler", default=False))
        self.guard.probe(free=over)
        if not over:
            return
        self._tell()
        self.fresh.clear()
        self._update = {}
        metrics = self.guard.metrics()
        self._record(metrics)
        if self.engine.is_mp_src_rank_with_outputs():
            # Without one, veRL takes the least or the most of what has "min" or "max" in its name.
            means = {name: Metric(AggregationType.MEAN, value) for name, value in metrics.items()}
            outputs["metrics"].update(means)

    def _record(self, metrics: dict[str, float]) -> None:
        if self.engine.rank or self.settings.folder is None:
            return
        if self.history is None:
            # Only now: a resumed run has read its state by the time of its first step.
            path, self._began = Path(self.settings.folder) / HISTORY, perf_counter()
            self.history = History(path, asdict(self.settings.guard), self._start)
        self.history.report(
            self.guard.steps, metrics, active=self.guard.trained, seconds=perf_counter() - self._began
        )

    # State

    def save(self, folder: Path) -> bool:
        """Save this rank's state, and the sums by layer and module so far into the history.

        Returns:
            Whether all ranks' states are in place; see `Checkpoints.save`.
        """
        if self.settings.folder is not None:
            # All ranks: energies of a sharded model are sums over them. An engine is not told of a run's end.
            places = self.guard.places()
            if self.history is not None:
                self.history.places(self.guard.steps, places)
        return self.checkpoints.save(folder)

    def resume(self, folder: Path) -> None:
        """Read this rank's state beside weights that the engine has just read; see `Checkpoints.resume`."""
        self.checkpoints.resume(folder)
        self._go_on()

    def _go_on(self) -> None:
        self._start = self.guard.steps
        self._tell()

    # Parts

    def _labels(self, data: Any) -> list[str | None]:
        return batch.labels(data, self.guard.config.domain_column, batch.uids_of(data))

    def _shares(self, counts: dict[str, int]) -> dict[str, float]:
        """Rows of all ranks by domain; by name, so that all ranks do the same in the same order."""
        shares: dict[str, float] = {}
        for theirs in self._gather(counts):
            for name, count in theirs.items():
                shares[name] = shares.get(name, 0.0) + count
        return {name: shares[name] for name in sorted(shares)}

    def _tell(self) -> None:
        """Let the data know who must recover, before the step is over."""
        if self.link is not None and self.engine.rank == 0:
            # A former run's may have no rows in this one, and is given up at its first step.
            wanted = self.guard.recovery
            self.link.report(wanted if wanted in (self.guard.recoverable or ()) else None)

    def _new_rows(self, data: Any, names: Sequence[str | None]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        finite = batch.finite_rewards(data)
        for row in self.fresh.take(batch.row_numbers(data)):
            name = names[row]
            if name is not None and finite[row]:
                found.setdefault(name, []).append(row)
        return found

    def _scores(self, rows: Completions) -> Tensor:
        if math.isnan(rows.temperature):
            raise HostError(
                "The batch has no temperature, so its completions cannot be scored as they were sampled."
            )
        return batch.log_probabilities(self.engine, rows)

    def _reduce(self, values: Tensor, kind: str) -> Tensor:
        result = values.clone()
        dist.all_reduce(result, dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX, group=self.group)
        return result

    def _gather(self, mine: Any) -> list[Any]:
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def _say(self, line: str) -> None:
        if self.engine.rank == 0:
            say(line)

    def _introduce(self) -> None:
        config = self.guard.config
        count = sum(parameter.numel() for parameter in self.engine.module.parameters() if parameter.requires_grad)
        # Ranks of sequence parallelism share their rows.
        size = dist.get_world_size()
        ranks = f"{size} ranks" + (f" (data-parallel size {self.world})" if self.world < size else "")
        self._say(
            f"guards {count:,} parameters of {type(self.engine).__name__} on {ranks}: budget "
            f"{config.budget}, rank {config.rank}, domains by {config.domain_column!r}, "
            f"recovery {'on' if config.recovery else 'off'}."
        )


def _counts(names: Sequence[str | None]) -> dict[str, int]:
    return dict(Counter(name for name in names if name is not None))
