"""The guard inside an unmodified TRL trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import TrainerCallback

from interference_guard.checkpoint import weights_beside
from interference_guard.config import GuardConfig
from interference_guard.errors import ConfigError, HostError
from interference_guard.guard import Guard
from interference_guard.handover import checksums, compare
from interference_guard.history import HISTORY, History
from interference_guard.names import named
from interference_guard.optimizer import StepHooks, attach
from interference_guard.probe import Completions, model_policy
from interference_guard.recovering import abandon_unserved
from interference_guard.telling import warn

from .attached import Attached
from .card import add_section
from .completions import trainer_policy
from .engines import batch_size, check_engine, guarded_model, reduce, steps_in_backward
from .live import LiveDisplay
from .plan import look_ahead
from .recovery import RecoveryRows
from .reference import read
from .rows import DomainTable, check_dataset, packs
from .seams import Seams


class InterferenceGuardCallback(TrainerCallback):  # type: ignore[misc]
    """Protects every domain that a trainer has finished, or has left for a while, while it trains others.

    Works with `GRPOTrainer`, `RLOOTrainer` and `SFTTrainer`. A column of the data set names each row's domain.

    Args:
        trainer (`Trainer`, *optional*): The trainer to guard; call `trainer.add_callback` with this object
            afterwards. Without one, call `attach`.
        config (`GuardConfig`, *optional*, defaults to `GuardConfig()`): Settings.
        recovery_datasets (`dict[str, Dataset]`, *optional*): Rows for recovery phases by domain; by default the
            training set's own rows of the domain. Needed if that is a stream, or does not hold the domain.
        reference (`dict[str, Dataset]`, *optional*): Reference domains by name: rows with a prompt and a
            completion for an ability that the model has before training and must keep.
        live (`bool`, *optional*, defaults to `False`): Show the guard's metrics in the terminal at every log: a
            panel under the progress bar, or a line where there is no terminal.

    Raises:
        ConfigError: If an argument is not what it must be.
        HostError: If the trainer or its dataset lacks what the guard needs.
        MissingDomainError: If a row has no domain.
        UnsupportedError: If the model cannot be guarded. In each case nothing has been changed.

    Example:
        ```python
        # In an order that keeps domains apart: see `order_by_domain`.
        trainer = GRPOTrainer(model, reward_funcs, args, train_dataset=ordered)
        trainer.add_callback(InterferenceGuardCallback(trainer, GuardConfig(budget=0.02)))
        ```
    """

    def __init__(
        self,
        trainer: Any = None,
        config: GuardConfig | None = None,
        *,
        recovery_datasets: Mapping[str, Any] | None = None,
        reference: Mapping[str, Any] | None = None,
        live: bool = False,
    ) -> None:
        self.config = config if config is not None else GuardConfig()
        if not isinstance(self.config, GuardConfig):
            raise ConfigError(f"config is of type {type(config).__name__}; give a GuardConfig(budget=0.02).")
        self.guard: Guard | None = None
        self.recovery_datasets = recovery_datasets
        self.reference = reference
        self._reference: dict[str, Completions] = {}
        self.history: History | None = None
        self.live = LiveDisplay() if live else None
        self._began = 0.0
        self.domains = DomainTable(self.config.domain_column)
        self._made: Attached | None = None
        self._hooks: StepHooks | None = None
        self._training: str | None = None
        # Of the weights that the last run ended with.
        self._left: dict[str, str] | None = None
        for name, value in (("recovery_datasets", recovery_datasets), ("reference", reference)):
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(
                    f"{name} is of type {type(value).__name__}; it must be a mapping, {{'math': dataset}}."
                )
            for key in value or ():
                if not named(key):
                    raise ConfigError(
                        f"{name} has the key {key!r}; it must be a domain's name, a non-empty string: "
                        "{'math': dataset}."
                    )
        if recovery_datasets and self.config.enabled and not self.config.recovery:
            raise ConfigError(
                f"recovery_datasets has rows for {sorted(recovery_datasets)}, and recovery=False trains none of "
                "them. Set recovery=True in GuardConfig, or leave recovery_datasets out."
            )
        if trainer is not None:
            self._wire(trainer)

    # Attaching

    def attach(self, trainer: Any) -> InterferenceGuardCallback:
        """Guard this trainer from now on, and leave the previous one; adds the callback if it is missing.

        The guard keeps what it knows: the next trainer must use the same model, or one with the same
        parameters.
        """
        self._wire(trainer)
        if self not in _callbacks(trainer):
            trainer.add_callback(self)
        return self

    def detach(self) -> None:
        """Remove every hook and wrapped method; the trainer is as it was, and can be freed. Works at any time."""
        self._unhook()
        if self.live is not None:
            self.live.close()
        if self._made is not None:
            trainer = self._made.trainer
            self._made.seams.restore()
            if self in _callbacks(trainer):
                trainer.remove_callback(self)
        self._made = None
        if self.guard is not None:
            # The one before holds the trainer.
            self.guard.policy = model_policy(self.guard.model)

    def save(self, directory: str | Path) -> None:
        """Save the guard's state beside a model that you save yourself; every rank must call it.

        Each rank has its own completions, and of a sharded model its own part. Nothing is saved if
        `enabled` is False.
        """
        if self.config.enabled:
            self._attached.checkpoints.save(directory)

    def load(self, directory: str | Path) -> None:
        """Continue from the state in a checkpoint of another run; every rank must call it before training.

        The model must be loaded from the same checkpoint. If the trainer shards it, the state is distributed
        when training begins, and the number of ranks may have changed.

        Raises:
            ConfigError: If `directory` is no path.
            StateError: If a file is missing, damaged, or of another model or other settings.
        """
        if self.config.enabled:
            self._attached.checkpoints.load(directory)
            compare(weights_beside(Path(directory)), self._attached.guard.view, f"saved in {directory}")

    def _wire(self, trainer: Any) -> None:
        if not self.config.enabled:
            return
        if self._made is not None and self._made.trainer is trainer:
            return
        seams = Seams(trainer, self.config.recovery)
        if any(isinstance(item, InterferenceGuardCallback) and item is not self for item in _callbacks(trainer)):
            raise HostError(
                "Another InterferenceGuardCallback is on this trainer. Call its detach() first; one callback "
                "guards all domains."
            )
        check_engine(trainer.accelerator)
        self.domains.reserved = frozenset(self.reference or {})
        check_dataset(trainer.train_dataset, self.domains, packs(trainer))
        recovery = (
            RecoveryRows(trainer, self.config.domain_column, self.recovery_datasets)
            if self.config.recovery
            else None
        )
        known = self.guard.domains if self.guard is not None else {}
        self._reference = {
            name: read(trainer, name, dataset)
            for name, dataset in (self.reference or {}).items()
            if name not in known
        }
        model = guarded_model(trainer)
        processes = trainer.accelerator.num_processes
        if self.guard is None:
            self.guard = Guard(model, self.config)
        elif model is not trainer.model or not steps_in_backward(trainer):
            self.guard.bind(model)
        self.detach()
        self.guard.policy = trainer_policy(trainer)
        self.guard.keepers = processes
        self.guard.ranks.reduce = reduce if processes > 1 else None
        compare(self._left, self.guard.view, "the run before ended with")
        self._left = None
        try:
            self._made = Attached(seams, self.guard, self.domains, self._heard, recovery)
            if recovery is not None:
                seams.wrap("get_batch_samples", self._batches)
            seams.wrap("log", self._log)
            seams.wrap("train", self._train)
            if hasattr(trainer, "create_model_card"):
                seams.wrap("create_model_card", self._card)
        except BaseException:
            # Of a trainer that turns out to lack something nothing stays wrapped.
            seams.restore()
            self._made = None
            raise
        if self.live is not None:
            self.live.bars = not trainer.args.disable_tqdm

    @property
    def _attached(self) -> Attached:
        if self._made is None:
            raise HostError(
                "The callback has no trainer. Call attach(trainer) before trainer.train(), load() and save(), "
                "and detach() after them."
            )
        return self._made

    def _unhook(self) -> None:
        if self._hooks is not None:
            self._hooks.detach()
        self._hooks = None

    # Wrapped methods of the trainer

    def _batches(self, method: Any) -> Any:
        def get_batch_samples(iterator: Any, *args: Any, **kwargs: Any) -> Any:
            # The planned rows are always drawn, so that what a step trains depends on its number alone.
            batches, items = method(iterator, *args, **kwargs)
            made = self._attached
            domain = made.guard.recovery
            if domain != self._training:
                # Completions of the domain before would otherwise be used up first.
                self._training, made.trainer._buffered_inputs = domain, None
            if domain is not None and made.recovery is not None and batches:
                batches = made.recovery.batches(domain, batches)
            return batches, items

        return get_batch_samples

    def _log(self, method: Any) -> Any:
        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            # The last line of a run sums it up; the guard's means belong to the steps before.
            last = "train_runtime" in logs
            if last and self.live is not None:
                # While the trainer's bar still stands: the panel's lines are counted from there.
                self.live.close()
            # A host that logs lines of its own may do so on one rank, where a sharded model's metrics would wait.
            if self.guard is None or "loss" not in logs or last:
                return method(logs, *args, **kwargs)
            logs = {**logs, **self.guard.metrics()}
            if self.history is not None:
                seconds = perf_counter() - self._began
                self.history.report(self.guard.steps, logs, active=self.guard.active, seconds=seconds)
            result = method(logs, *args, **kwargs)
            if self.live is not None and self._attached.trainer.is_world_process_zero():
                self.live.show(self.guard, logs)
            return result

        return log

    def _train(self, method: Any) -> Any:
        def train(*args: Any, **kwargs: Any) -> Any:
            count = sum(item is self for item in _callbacks(self._attached.trainer))
            if count != 1:
                raise HostError(
                    f"The callback is {count} times among the trainer's. Call trainer.add_callback(callback) "
                    "once, or attach(trainer) alone."
                )
            self._attached.checkpoints.begin()
            try:
                return method(*args, **kwargs)
            finally:
                # Also after an error or an interrupt: steps outside of the run are not the guard's, and the
                # prompt must not appear inside the panel.
                self._unhook()
                if self.live is not None:
                    self.live.close()

        return train

    def _card(self, method: Any) -> Any:
        def create(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            trainer = self._attached.trainer
            path = Path(trainer.args.output_dir) / "README.md"
            if trainer.is_world_process_zero() and path.is_file():
                add_section(path, self._attached.guard)
            return result

        return create

    # Events of the trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the step hooks; any that a crashed run left are removed first."""
        self._unhook()
        if not self.config.enabled:
            return
        made, config = self._attached, self.config
        trainer, guard = made.trainer, made.guard
        if state is not trainer.state:
            raise HostError(
                "The callback is attached to another trainer than the one that trains, and follows the rows of "
                "that one. Call callback.attach(trainer) for each trainer before its train(); to be among its "
                "callbacks is not enough."
            )
        made.rows.begin()
        rows, size = trainer.train_dataset, batch_size(trainer)
        look_ahead(rows, config.domain_column, args, state, config.active_share, size)
        if made.recovery is not None:
            self._training, trainer._buffered_inputs = None, None
            made.recover_from(made.recovery.renewed())
            abandon_unserved(guard)
        made.bind()
        # A resumed run has read them from its checkpoint by now.
        for name, rows in self._reference.items():
            if name not in guard.domains:
                guard.protect(name, rows)
        self._reference = {}
        if made.recovery is not None:
            made.recovery.look_for(name for name, own in guard.domains.items() if not own.reference)
        self._hooks = attach(trainer.optimizer, guard, self._begin_step if steps_in_backward(trainer) else None)
        self._began = perf_counter()
        self.history = None
        if state.is_world_process_zero:
            # The guard's own count goes on where each phase has a trainer of its own.
            self.history = History(Path(args.output_dir) / HISTORY, asdict(config), guard.steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the guard which domains the step's rows are of."""
        if not self.config.enabled:
            return
        if self._hooks is None:
            raise HostError("The callback was attached while training ran. Attach it before trainer.train().")
        if steps_in_backward(self._attached.trainer):
            # The step is over. Counts that are left are of one that was skipped.
            self._attached.rows.take_counts()
        else:
            self._begin_step()

    def _begin_step(self) -> None:
        self._attached.guard.begin(self._attached.rows.step_counts())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the domains whose turn it is."""
        if self.config.enabled:
            self._attached.guard.end()
            self._attached.guard.probe()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a state file that could not be written; the trainer's checkpoint is complete by now."""
        if self._made is not None:
            self._made.checkpoints.report()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the step hooks, and end the history with the sums by layer and module."""
        self._unhook()
        if not self.config.enabled:
            return
        guard = self._attached.guard
        self._left = checksums(guard.view)
        try:
            # All ranks: energies of a sharded model are sums over them.
            places = guard.places()
            if self.history is not None:
                self.history.places(guard.steps, places)
        except (RuntimeError, ValueError, OSError) as error:
            # The training is done; a table of a report must not take its result away.
            warn(f"The history ends without its sums by layer and module: {error!r}.")
        self._attached.checkpoints.report_late()

    # Parts

    def _heard(self, found: dict[str, float]) -> None:
        # True rewards by domain, of one round of evaluation.
        guard = self.guard
        if guard is None:
            return
        if found and self.history is not None:
            self.history.evaluation(guard.steps, found, active=guard.trained)
        for name, reward in found.items():
            # A domain that has not been trained yet has nothing to keep.
            if name in guard.domains:
                guard.calibrate(name, reward)


def _callbacks(trainer: Any) -> list[Any]:
    found: list[Any] = trainer.callback_handler.callbacks
    return found
