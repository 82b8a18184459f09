"""Protects what a policy learned in earlier domains, with a trust region sized by measured reward loss."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import GuardConfig
    from .errors import (
        CheckpointError,
        ConfigError,
        GuardError,
        HostError,
        MissingDomainError,
        ReportError,
        ShapeError,
        StateError,
        StateVersionError,
        UnknownDomainError,
        UnsupportedError,
    )
    from .guard import Guard
    from .optimizer import GuardedOptimizer, StepHooks, attach
    from .probe import Completions, Measurement, Policy, model_policy

try:
    __version__ = version("interference-guard")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "CheckpointError",
    "Completions",
    "ConfigError",
    "Guard",
    "GuardConfig",
    "GuardError",
    "GuardedOptimizer",
    "HostError",
    "Measurement",
    "MissingDomainError",
    "Policy",
    "ReportError",
    "ShapeError",
    "StateError",
    "StateVersionError",
    "StepHooks",
    "UnknownDomainError",
    "UnsupportedError",
    "attach",
    "model_policy",
]

# Names are looked up when they are used: torch takes seconds to import, and most commands do without it.
_HOMES = {
    "config": ("GuardConfig",),
    "guard": ("Guard",),
    "optimizer": ("GuardedOptimizer", "StepHooks", "attach"),
    "probe": ("Completions", "Measurement", "Policy", "model_policy"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f".{_HOME.get(name, 'errors')}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
