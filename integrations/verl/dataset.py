"""veRL's data set with batches of one domain each; loaded by `data.custom_cls`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from verl.utils.dataset.rl_dataset import RLHFDataset

from interference_guard.errors import ConfigError, HostError, MissingDomainError
from interference_guard.names import named
from interference_guard.rehearsal import check_active_share

from .batch import CARRIER
from .coordinator import Link, launch
from .domain_settings import check_names
from .drawing import check_drawing
from .order import DomainOrder
from .settings import DOMAIN_COLUMN, RunSettings, warn_unguarded


class DomainDataset(RLHFDataset):  # type: ignore[misc]
    """Rows of `data.train_files` in an order that keeps domains apart; validation rows as veRL reads them.

        data.custom_cls.path=pkg://interference_guard.integrations.verl.dataset
        data.custom_cls.name=DomainDataset
        data.shuffle=false data.dataloader_num_workers=0
        +data.domain_order=[math,code] +data.domain_batches=100

    With ``+guard.recovery=true`` a domain that must recover takes the place of the planned one, from the batch
    after the step that asked for it. With ``+data.domain_rehearsal=0.25 +guard.active_share=0.5`` a quarter of
    each batch is of domains that were trained before, which stay protected.

    Raises:
        ConfigError: If a setting of its own is misspelt, if the data is shuffled or read by other
            processes, if a step of the run is not one batch of it, if validation reads the same files, if the
            trainer is one that is not supported, or if the order cannot be served.
        MissingDomainError: If a row has no domain.
    """

    def __init__(self, data_files: Any, tokenizer: Any, config: DictConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(data_files, tokenizer, config, *args, **kwargs)
        self.order: DomainOrder | None = None
        self._column = DOMAIN_COLUMN
        self._link: Link | None = None
        if _listed(self.original_data_files) != _listed(config.train_files):
            return
        check_names(config)
        if _listed(config.get("val_files")) == _listed(config.train_files):
            raise ConfigError(
                f"data.val_files are data.train_files, {_listed(config.train_files)}: DomainDataset tells the "
                "two sets apart by their files. Copy the file to validate on the same rows."
            )
        for name, allowed in {"shuffle": False, "dataloader_num_workers": 0}.items():
            if config.get(name) != allowed:
                raise ConfigError(
                    f"data.{name}={config.get(name)!r} is not allowed with DomainDataset: it must be {allowed}. "
                    "The order of the rows, and a phase that begins with the next batch, depend on it."
                )
        whole = config._get_root()
        run = RunSettings.of(whole) if "actor_rollout_ref" in whole else None
        order = _plain(config.get("domain_order", "sequential"))
        rehearsal = config.get("domain_rehearsal", 0.0)
        self._column = DOMAIN_COLUMN if run is None else run.guard.domain_column
        self.order = DomainOrder(
            self._domains(self._column),
            int(config.train_batch_size),
            order,
            batches=_plain(config.get("domain_batches")),
            rehearsal=rehearsal,
            seed=int(config.get("seed") or 0),
        )
        if run is not None and run.guard.enabled:
            check_active_share(rehearsal, self.order.prompts, run.guard.active_share, "data.domain_rehearsal")
        recovers = run is not None and run.guard.enabled and run.guard.recovery
        check_drawing(whole, order, len(self.order.plan), recovers)
        if run is not None and run.guard.enabled:
            warn_unguarded(whole)
        if recovers:
            self._link = launch(list(self.order.rows))

    def _domains(self, column: str) -> list[str]:
        if column not in self.dataframe.column_names:
            raise HostError(
                f"data.train_files have no column {column!r}, only {sorted(self.dataframe.column_names)}. "
                "Add it, or name another one with +guard.domain_column=..."
            )
        # As they are stored, and at once: row by row a large file takes minutes.
        found: list[str] = list(self.dataframe.with_format(None)[column][:])
        for index, name in enumerate(found):
            if not named(name):
                raise MissingDomainError(
                    f"Row {index} of data.train_files has {column}={name!r}: every row needs a non-empty string "
                    "there."
                )
        return found

    def __len__(self) -> int:
        return len(self.dataframe) if self.order is None else len(self.order)

    def __getitem__(self, item: int) -> Any:
        if self.order is None:
            return super().__getitem__(item)
        row: dict[str, Any] = super().__getitem__(self.order.row(item, self._wanted))
        if self._column != DOMAIN_COLUMN:
            # Trainer V0 hands on a few columns alone, and this is one of them.
            row[CARRIER] = {**(row.get(CARRIER) or {}), self._column: row[self._column]}
        return row

    def _wanted(self) -> str | None:
        return None if self._link is None else self._link.wanted()

    def state_dict(self) -> dict[str, Any]:
        """What veRL's data loader saves with its own state."""
        return {} if self.order is None else self.order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the rows stood."""
        if self.order is not None:
            self.order.load_state_dict(state)


def _listed(files: Any) -> list[str]:
    return [str(item) for item in files] if isinstance(files, list | ListConfig) else [str(files)]


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value
