"""Keeps what a policy learned in earlier domains inside a trust region measured in reward."""

from importlib.metadata import PackageNotFoundError, version

from .config import GuardConfig
from .errors import (
    ConfigError,
    GuardError,
    HostError,
    MissingDomainError,
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
    "ShapeError",
    "StateError",
    "StateVersionError",
    "StepHooks",
    "UnknownDomainError",
    "UnsupportedError",
    "attach",
    "model_policy",
]
