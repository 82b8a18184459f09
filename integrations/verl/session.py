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

from interference_guard import checkpoint
from interference_guard.errors import GuardError, HostError, StateError
from interference_guard.files import HISTORY
from interference_guard.guard import Guard
from interference_guard.handover import compare, compare_regions
from interference_guard.history import History
from interference_guard.optimizer import attach
from interference_guard.probe import Completions, spread
from interference_guard.recovering import abandon_unserved

from . import batch
from .coordinator import Link
from .settings import RunSettings

ADVICE = (
    "Set actor_rollout_ref.model.path to the weights of the checkpoint that +guard.state names: its folder "
    "huggingface, if it was saved with actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,"
    "hf_model]. verl.model_merger rounds to bf16."
)


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
        self._former = former
        self.group = engine.get_data_parallel_group()
        self.world = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self.temperature = math.nan
        self.fresh = batch.FreshRows()
        # Rows of all ranks in the present update, by domain.
        self._update: dict[str, float] = {}
        self._failed: GuardError | None = None
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
        if self._former is not None:
            self._take_over(self._former)
            self._former = None
        error, self._failed = self._failed, None
        if error is not None:
            raise error
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
                data, [rows[place] for place in spread(len(rows), limit)], self.temperature
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
        self.history.report(self.guard.steps, self.guard.trained, metrics, perf_counter() - self._began)

    # State

    def save(self, folder: Path) -> bool:
        """Write this rank's state, and the sums by layer and module so far into the history.

        What cannot be written is said, and an error of all ranks' next step: the trainer's own checkpoint, of
        which the engine's is a part, is complete only after this.

        Returns:
            Whether all ranks' states are written.
        """
        if self.settings.folder is not None:
            # All ranks: energies of a sharded model are sums over them. An engine is not told of a run's end.
            places = self.guard.places()
            if self.history is not None:
                self.history.places(self.guard.steps, places)
        ranks, failed = dist.get_world_size(), None
        try:
            self.guard.save(folder, folders=ranks, place=(self.rank, self.world))
        except GuardError as error:
            failed = error
        found: list[str | None] = [None] * ranks
        dist.all_gather_object(found, None if failed is None else str(failed))
        messages = [message for message in found if message is not None]
        if messages:
            self._failed = failed or StateError(messages[0])
            self._say(
                f"A checkpoint is without the guard's state on {len(messages)} of {ranks} ranks, so a guarded "
                f"run cannot resume from it: {messages[0]} Former checkpoints are kept, and the next step is an "
                "error."
            )
        return not messages

    def load(self, folder: Path) -> None:
        """Read this rank's state, or what belongs to it of the states of another number of ranks.

        Raises:
            StateError: If it is missing, damaged, of another model, or if a rank's folder is missing.
        """
        stem = folder.name.rstrip("0123456789")
        checkpoint.load_own(
            self.guard,
            lambda rank: folder.with_name(f"{stem}{rank}"),
            dist.get_rank(),
            dist.get_world_size(),
            (self.rank, self.world),
        )
        # A run that had trained nothing yet, as veRL's critic_warmup lets it, still has to begin with it.
        if self.guard.steps or self.guard.domains:
            self._former = None
        self._start = self.guard.steps
        self._tell()

    def _take_over(self, folder: Path) -> None:
        """Read the state of a former run, and see whether the weights are those that it was saved beside."""
        self.load(folder)
        where = f"saved beside {folder}"
        if not compare(checkpoint.weights_beside(folder), self.guard.view, where, ADVICE):
            compare_regions(self.guard, where, ADVICE)

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
        from .plugin import say

        if self.engine.rank == 0:
            say(line)

    def _introduce(self) -> None:
        config = self.guard.config
        count = sum(parameter.numel() for parameter in self.engine.module.parameters() if parameter.requires_grad)
        self._say(
            f"guards {count:,} parameters of {type(self.engine).__name__} on {self.world} ranks: budget "
            f"{config.budget}, rank {config.rank}, domains by {config.domain_column!r}, "
            f"recovery {'on' if config.recovery else 'off'}."
        )


def _counts(names: Sequence[str | None]) -> dict[str, int]:
    return dict(Counter(name for name in names if name is not None))
