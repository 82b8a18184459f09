"""The guard's settings in a veRL run: the `guard` node at the top of its configuration."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from interference_guard.config import GuardConfig
from interference_guard.errors import ConfigError, HostError

NODE = "guard"
# veRL's own column of a row's origin, by which it also groups rewards and validation.
DOMAIN_COLUMN = "data_source"


def guard_config(table: Mapping[str, Any] | None) -> GuardConfig:
    """Build the guard's configuration from the `guard` node.

    Args:
        table: The node, or None where the run has none: all defaults.

    Raises:
        ConfigError: If a key is unknown or a value is not allowed.

    >>> guard_config({"budget": 0.05}).budget
    0.05
    >>> guard_config({"budgett": 0.05})
    Traceback (most recent call last):
    interference_guard.errors.ConfigError: guard.budgett is not a setting. Did you mean guard.budget? ...
    """
    if isinstance(table, DictConfig):
        table = OmegaConf.to_container(table, resolve=True)
    if table is None:
        table = {}
    if not isinstance(table, Mapping):
        raise ConfigError(f"guard={table!r} is not allowed: write one key each, for instance +guard.budget=0.02.")
    known = [item.name for item in fields(GuardConfig)]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ConfigError(
                f"guard.{key} is not a setting. Did you mean guard.{near[0]}? All settings: {', '.join(known)}."
            )
    return GuardConfig(**{"domain_column": DOMAIN_COLUMN, **table})


@dataclass(frozen=True)
class RunSettings:
    """What the guard needs to know of a run.

    Args:
        guard: Its own settings.
        folder: Where the run writes its checkpoints, and the guard its history; None where nothing says so.
    """

    guard: GuardConfig
    folder: str | None = None

    @classmethod
    def of(cls, config: DictConfig) -> RunSettings:
        """The settings in a run's whole configuration."""
        folder = OmegaConf.select(config, "trainer.default_local_dir", default=None)
        return cls(guard_config(config.get(NODE)), None if folder is None else str(folder))


_found: RunSettings | None = None


def remember(config: Any) -> None:
    """Take the settings from a part of the run's configuration; parts know the whole they belong to.

    Anything else than such a part is left alone.
    """
    global _found
    if not isinstance(config, DictConfig):
        return
    whole = config._get_root()
    if isinstance(whole, DictConfig) and "actor_rollout_ref" in whole:
        _found = RunSettings.of(whole)


def recall() -> RunSettings:
    """The settings of this process's run.

    Raises:
        HostError: If the engine is built by something else than veRL's actor worker.
    """
    if _found is None:
        raise HostError(
            "The engine was built outside of veRL's ActorRolloutRefWorker, so the run's +guard.* settings are "
            "not at hand. Train with verl.trainer.main_ppo, or call "
            "interference_guard.integrations.verl.settings.remember(config) with the whole configuration first."
        )
    return _found
