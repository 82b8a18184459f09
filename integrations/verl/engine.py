"""The guard inside a veRL engine: a mixin over whatever class the registry holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from interference_guard.errors import UnsupportedError

from .compat import hide_trl
from .session import Session
from .settings import recall

STRATEGY = "fsdp2"


if TYPE_CHECKING:

    class _Engine:
        """What the engine class behind the mixin provides."""

        engine_config: Any
        rank: int

        def initialize(self) -> None: ...
        def train_batch(self, data: Any, loss_function: Any) -> Any: ...
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any: ...
        def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any: ...

else:
    _Engine = object


class GuardMixin(_Engine):
    """Guards an engine that trains; one that only runs forward is left alone."""

    interference: Session | None = None

    def initialize(self) -> None:
        """Build the engine, then its guard.

        Raises:
            UnsupportedError: If the engine's parameters cannot be guarded; nothing is built then.
            ConfigError: If a +guard.* setting is unknown or not allowed.
        """
        # Here and not on import, since a process with no engine, as that of a reward function, may use TRL.
        hide_trl()
        if self.engine_config.forward_only:
            super().initialize()
            return
        settings = recall()
        if settings.guard.enabled:
            check_strategy(self.engine_config.strategy)
        super().initialize()
        if settings.guard.enabled:
            former = None if settings.state is None else self._state_folder(settings.state)
            self.interference = Session(self, settings, former)

    def train_batch(self, data: Any, loss_function: Any) -> Any:
        """One mini-batch of veRL's: one optimizer step."""
        if self.interference is None:
            return super().train_batch(data, loss_function)
        self.interference.begin(data)
        outputs = super().train_batch(data, loss_function)
        self.interference.end(data, outputs)
        return outputs

    def save_checkpoint(
        self,
        local_path: str | None,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The guard's state, then the engine's checkpoint beside it; without a path neither."""
        if self.interference is not None and local_path is not None:
            # First, since the engine deletes former checkpoints, which must stay where this one lacks the state.
            written = self.interference.save(self._state_folder(local_path))
            max_ckpt_to_keep = max_ckpt_to_keep if written else None
        return super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep, **kwargs)

    def load_checkpoint(self, local_path: str | None, *args: Any, **kwargs: Any) -> Any:
        """The engine's checkpoint, then the guard's; without a path neither."""
        result = super().load_checkpoint(local_path, *args, **kwargs)
        if self.interference is not None and local_path is not None:
            self.interference.resume(self._state_folder(local_path))
        return result

    def _state_folder(self, local_path: str) -> Path:
        return Path(local_path) / f"interference_guard_rank{self.rank}"


def check_strategy(strategy: str) -> None:
    """Refuse engines whose parameters hold no whole rows or columns.

    Raises:
        UnsupportedError: For every strategy but fsdp2.
    """
    if strategy == STRATEGY:
        return
    why = (
        "flattens the parameters of a block into one, so the rows and columns that the guard protects are gone"
        if strategy == "fsdp"
        else "lays parameters out in a way the guard does not know"
    )
    raise UnsupportedError(
        f"The actor's engine is built with strategy={strategy!r}, which {why}. Set "
        "actor_rollout_ref.actor.strategy=fsdp2 (and actor_rollout_ref.ref.strategy=fsdp2), with veRL 0.7 also "
        "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2, or take the guard out of "
        "actor_rollout_ref.model.external_lib."
    )


def guarded(engine: type[Any]) -> type[Any]:
    """The engine class with the guard mixed in; a guarded class is returned as it is."""
    if issubclass(engine, GuardMixin):
        return engine
    return type(f"Guarded{engine.__name__}", (GuardMixin, engine), {"__module__": engine.__module__})
