"""The settings under `data` that only `DomainDataset` reads, refused where nothing would heed them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from interference_guard.errors import ConfigError
from interference_guard.telling import warn

SETTINGS = ("domain_order", "domain_batches", "domain_rehearsal")
CLASS = "DomainDataset"
# How alike a name must be to be taken for a slip, as `difflib` counts.
NEAR = 0.75
USE = f"data.custom_cls.path=pkg://interference_guard.integrations.verl.dataset data.custom_cls.name={CLASS}"


def check_names(data: Mapping[str, object]) -> None:
    """Check that nothing under `data` is nearly a setting of the data set.

    Raises:
        ConfigError: If something is.

    >>> check_names({"domain_ordre": ["math", "code"]})
    Traceback (most recent call last):
    interference_guard.errors.ConfigError: data.domain_ordre is not a setting. Did you mean data.domain_order? ...
    """
    for key in data:
        # A subclass may have settings of its own, and veRL has many.
        near = difflib.get_close_matches(str(key).lower(), SETTINGS, n=1, cutoff=NEAR)
        if near and key not in SETTINGS:
            raise ConfigError(
                f"data.{key} is not a setting. Did you mean data.{near[0]}? All of {CLASS}: "
                f"{', '.join(SETTINGS)}."
            )


def check_reader(config: DictConfig) -> None:
    """Check that a run with such settings has a data set that reads them.

    Raises:
        ConfigError: If it has veRL's own. A class that may be a subclass of `DomainDataset` is a warning.
    """
    found = [name for name in SETTINGS if OmegaConf.select(config, f"data.{name}", default=None) is not None]
    path, name = (OmegaConf.select(config, f"data.custom_cls.{part}", default=None) for part in ("path", "name"))
    if not found or (path is not None and str(name).endswith(CLASS)):
        return
    if path is None:
        raise ConfigError(
            f"data.{found[0]} is set, and data.custom_cls.path is not: veRL's own data set does not read it, and "
            f"shuffles domains. Set {USE}, or leave {found[0]} out."
        )
    warn(
        f"data.{found[0]} is set, and only {CLASS} and its subclasses read it; data.custom_cls.name is {name!r}. "
        f"Where that is none of them set {USE}; let the name of a subclass end in {CLASS}."
    )
