"""What in a run's configuration would take rows of several batches into one step."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from interference_guard.errors import ConfigError
from interference_guard.telling import warn

# Settings that fill a step up with the rows that come next.
REFILLS = ("algorithm.filter_groups.enable", "trainer.v1.sampler.sync_refill_failed_groups")


def check_drawing(whole: DictConfig, order: object, batches: int, recovery: bool = False) -> None:
    """Refuse what mixes the batches that the data set keeps apart, and say what only delays or repeats them.

    Args:
        whole: The run's configuration.
        order: `data.domain_order`.
        batches: Batches of one epoch.
        recovery: Whether a domain may take the place of the planned one.

    Raises:
        ConfigError: If a step's rows are not one batch of the data set's, or if recovery is asked for where
            batches are drawn ahead.
    """

    def found(name: str) -> Any:
        return OmegaConf.select(whole, name, default=None)

    for name in REFILLS:
        if found(name):
            raise ConfigError(
                f"{name}={found(name)!r} is not allowed with DomainDataset: it fills a step up with rows of the "
                "next batches, which are of other domains, so that hardly any step would train one domain. Set "
                "it to False."
            )
    # Until veRL 0.7 any class was taken here; later releases have no such setting.
    if (sampler := found("data.sampler.class_path")) is not None:
        raise ConfigError(
            f"data.sampler.class_path={sampler!r} is not allowed with DomainDataset: a sampler draws rows in an "
            "order of its own, so that batches mix domains. Leave it out, and order them by +data.domain_order."
        )
    older = found("trainer.use_v1") is False or found("trainer.v1") is None
    drawn, trained = found("data.gen_batch_size"), found("data.train_batch_size")
    if older and drawn is not None and drawn != trained:
        raise ConfigError(
            f"data.gen_batch_size={drawn!r} is not allowed with DomainDataset: a step must be one batch of "
            f"data.train_batch_size={trained!r} rows. Leave it out."
        )
    if (samples := found("data.train_max_samples")) is not None and samples > 0:
        raise ConfigError(
            f"data.train_max_samples={samples!r} is not allowed with DomainDataset: of "
            "rows that are not shuffled veRL takes the first, and with them the first domains alone. Leave it "
            "out, and say with +data.domain_batches how much of each domain is trained."
        )
    mode = found("trainer.v1.trainer_mode")
    ahead = not older and mode not in (None, "sync")
    # verl.experimental.one_step_off_policy has a node of this name, and the trainer mode of the others.
    if recovery and (ahead or found("rollout") is not None):
        raise ConfigError(
            "guard.recovery=True is not allowed with a trainer that draws batches ahead "
            f"({f'trainer.v1.trainer_mode={mode!r}' if ahead else 'one_step_off_policy'}): rows of the domain "
            "that recovered would still come after its phase, and a domain's own steps end the protection of "
            "what it had. Use trainer.v1.trainer_mode=sync, or +guard.recovery=false."
        )
    if ahead:
        warn(
            f"trainer.v1.trainer_mode={mode!r} trains rows in the order in which they are finished, so steps at "
            "the borders of batches mix domains, and count for none. Give domains long phases, or use sync."
        )
    epochs, steps = found("trainer.total_epochs"), found("trainer.total_training_steps")
    if order != "round_robin" and (epochs or 1) > 1 and not (steps and steps <= batches):
        warn(
            f"trainer.total_epochs={epochs}: the order of the domains starts anew with each epoch of {batches} "
            "batches. For one pass through it set trainer.total_epochs=1."
        )
