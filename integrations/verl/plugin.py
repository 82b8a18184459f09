"""Registers the guard with veRL: its engines get the guard mixed in, wherever they are built from now on."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from tensordict import TensorDict

from interference_guard.errors import HostError

from . import settings
from .batch import number_rows
from .compat import check_version, check_workers, hide_trl

MODEL_TYPE = "language_model"


def register() -> None:
    """Wrap every language-model engine in the registry; a second call wraps only what is new.

    Raises:
        HostError: If this veRL is another one than tested, or lacks a seam; nothing is wrapped then.
    """
    check_version()
    check_workers()
    hide_trl()
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
    convert = workers.omega_conf_to_dataclass
    if getattr(convert, "guarded", False):
        return

    @wraps(convert)
    def noting(config: Any, *args: Any, **kwargs: Any) -> Any:
        settings.remember(config)
        # Another library may have registered an engine since.
        _wrap(engines)
        return convert(config, *args, **kwargs)

    noting.guarded = True  # type: ignore[attr-defined]
    workers.omega_conf_to_dataclass = noting


def _number(worker: Any) -> None:
    """Number the rows of each update before it is cut into mini-batches, which several epochs draw anew."""
    if getattr(worker, "interference_guard_numbers", False):
        return
    train = worker.train_mini_batch

    # With its attributes, by which Ray's groups dispatch it.
    @wraps(train)
    def numbering(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        # The critic's worker is of the same class, and gets a handle whose rows come later.
        if getattr(self.engine, "interference", None) is not None and isinstance(data, TensorDict):
            number_rows(data)
        return train(self, data, *args, **kwargs)

    worker.train_mini_batch = numbering
    worker.interference_guard_numbers = True


def say(line: str) -> None:
    """Write a line where veRL's own console logger writes."""
    sys.stdout.write(f"interference_guard: {line}\n")
    sys.stdout.flush()
