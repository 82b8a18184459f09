"""The guard's settings in a veRL run: the `guard` node at the top of its configuration."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from interference_guard.config import GuardConfig
from interference_guard.errors import ConfigError, HostError
from interference_guard.telling import warn

from .console import say
from .domain_settings import NEAR, check_reader

NODE = "guard"
# Of the node what is a path and no setting of the guard.
STATE = "state"
LIBRARY = "interference_guard.integrations.verl"
PACKAGE = "interference_guard"
# Nodes of veRL's under which a user may look for it.
PLACES = (
    "actor_rollout_ref",
    "actor_rollout_ref.actor",
    "actor_rollout_ref.model",
    "algorithm",
    "data",
    "trainer",
)
# veRL's own column of a row's origin, by which it also groups rewards and validation.
DOMAIN_COLUMN = "data_source"


def guard_config(table: Mapping[str, Any] | None) -> GuardConfig:
    """Build the guard's configuration from the `guard` node; its `state` is no part of it.

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
    known = [STATE, *(item.name for item in fields(GuardConfig))]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ConfigError(
                f"guard.{key} is not a setting. Did you mean guard.{near[0]}? All settings: {', '.join(known)}."
            )
    given = {key: value for key, value in table.items() if key != STATE}
    return GuardConfig(**{"domain_column": DOMAIN_COLUMN, **given})


def check_place(config: DictConfig) -> None:
    """Check that no settings of the guard stand where nothing would heed them.

    Raises:
        ConfigError: If a node at the top is nearly called `guard` and holds some, or veRL's own hold a `guard`.
    """
    known = {STATE, *(item.name for item in fields(GuardConfig))}
    slips = [
        str(name)
        for name, node in config.items()
        if name != NODE
        and isinstance(node, DictConfig)
        and difflib.get_close_matches(str(name).lower(), [NODE], n=1, cutoff=NEAR)
        and known.intersection(map(str, node))
    ]
    slips += [f"{name}.{NODE}" for name in PLACES if OmegaConf.select(config, f"{name}.{NODE}") is not None]
    if slips:
        raise ConfigError(
            f"The run has settings under {slips[0]!r}, which nothing reads. Those of the guard stand at the top, "
            f"for instance +{NODE}.budget=0.02."
        )


@dataclass(frozen=True)
class RunSettings:
    """What the guard needs to know of a run.

    Args:
        guard: Its own settings.
        folder: Where the run writes its checkpoints, and the guard its history; None where nothing says so.
        state: The engine's folder of a checkpoint, whose guard's state a new run begins with.
        resume_mode: Whether the trainer looks for a checkpoint to go on from; None where nothing says so.
    """

    guard: GuardConfig
    folder: str | None = None
    state: str | None = None
    resume_mode: str | None = None

    @classmethod
    def of(cls, config: DictConfig) -> RunSettings:
        """The settings in a run's whole configuration.

        Raises:
            ConfigError: As `guard_config` and `check_place`, and if the trainer loses the rows' domains.
        """
        check_place(config)
        guard = guard_config(config.get(NODE))
        if guard.enabled and config.get("async_training") is not None and (NODE in config or _loads(config)):
            raise ConfigError(
                "verl.experimental.fully_async_policy is not supported: it draws single prompts, and hands on "
                "none of the columns that could hold their domain. Train with verl.trainer.main_ppo."
            )
        names = ("trainer.default_local_dir", f"{NODE}.{STATE}", "trainer.resume_mode")
        found = [OmegaConf.select(config, name, default=None) for name in names]
        return cls(guard, *(None if value is None else str(value) for value in found))


def warn_unguarded(config: DictConfig) -> None:
    """Say that a run does not load the guard in its workers; a warning where it seems to be meant to."""
    if _loads(config):
        return
    where = "actor_rollout_ref.model.external_lib"
    wrong = [name for name in _libraries(config) if name.split(".")[0] == PACKAGE]
    if wrong:
        warn(
            f"{where} names {wrong[0]!r}, which guards nothing: the run trains unguarded. Name {LIBRARY} there, "
            "or set +guard.enabled=false."
        )
    elif config.get(NODE) is not None:
        warn(
            f"The run has +guard.* settings, and {where} without {LIBRARY}: it trains unguarded. Add the library "
            "there, or set +guard.enabled=false."
        )
    else:
        say(f"DomainDataset orders the rows, and the run trains unguarded: {where} does not name {LIBRARY}.")


def _loads(config: DictConfig) -> bool:
    # A module of the library brings the whole of it.
    return any(f"{name}.".startswith(f"{LIBRARY}.") for name in _libraries(config))


def _libraries(config: DictConfig) -> list[str]:
    found = OmegaConf.select(config, "actor_rollout_ref.model.external_lib", default=None)
    return [str(name) for name in ([found] if isinstance(found, str) else found or ())]


_found: RunSettings | None = None


def remember(config: Any) -> None:
    """Take the settings from a part of the run's configuration; parts know the whole they belong to.

    Anything else than such a part is left alone.

    Raises:
        ConfigError: As `RunSettings.of`, and if no data set of the run reads its settings of an order.
    """
    global _found
    if not isinstance(config, DictConfig):
        return
    whole = config._get_root()
    if isinstance(whole, DictConfig) and "actor_rollout_ref" in whole:
        found = RunSettings.of(whole)
        if found.guard.enabled:
            check_reader(whole)
        _found = found


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
