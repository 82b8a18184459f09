"""Registers the guard with veRL: its engines get the guard mixed in, wherever they are built from now on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from tensordict import TensorDict

from interference_guard.errors import HostError

from . import settings
from .compat import check_version, check_workers

MODEL_TYPE = "language_model"
# Functions that stand in the place of veRL's.
_ours: set[Any] = set()


def register() -> None:
    """Wrap every language-model engine in the registry; a second call wraps only what is new.

    Raises:
        HostError: If this veRL is another one than tested, or lacks a seam; nothing is wrapped then.
    """
    check_version()
    check_workers()
    from verl.workers import engine_workers
    from verl.workers.engine import EngineRegistry

    engines = getattr(EngineRegistry, "_engines", {}).get(MODEL_TYPE)
    worker = getattr(engine_workers, "TrainingWorker", None)
    if not engines or not hasattr(engine_workers, "omega_conf_to_dataclass") or worker is None:
        raise HostError(
            "veRL's engine registry holds no language-model engine, or its workers no longer convert their own "
            'configuration. Install a tested release: pip install "interference-guard[verl]".'
        )
    _wrap(engines)
    _watch(engine_workers, engines)
    _number(worker)


def _wrap(engines: dict[str, dict[Any, type[Any]]]) -> None:
    from .engine import guarded

    for table in engines.values():
        for key, engine in table.items():
            table[key] = guarded(engine)


def _watch(workers: Any, engines: dict[str, dict[Any, type[Any]]]) -> None:
    """Note the run's configuration when a worker converts its own part of it, just before it builds an engine."""

    def noting(convert: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        settings.remember(config)
        # Another library may have registered an engine since.
        _wrap(engines)
        return convert(config, *args, **kwargs)

    _replace(workers, "omega_conf_to_dataclass", noting)


def _number(worker: Any) -> None:
    """Show each update to the guard before it is cut into mini-batches, which several epochs draw anew."""

    def numbering(train: Any, self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        # The critic's worker is of the same class, and gets a handle whose rows come later.
        session = getattr(self.engine, "interference", None)
        if session is not None and isinstance(data, TensorDict):
            session.expect(data)
        return train(self, data, *args, **kwargs)

    _replace(worker, "train_mini_batch", numbering)


def _replace(owner: Any, name: str, call: Callable[..., Any]) -> None:
    """Put `call`, which is given the function it replaces first, in place of a function; once."""
    found = getattr(owner, name)
    if found in _ours:
        return

    # With its attributes, by which Ray's groups dispatch a worker's methods.
    @wraps(found)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return call(found, *args, **kwargs)

    _ours.add(replaced)
    setattr(owner, name, replaced)
