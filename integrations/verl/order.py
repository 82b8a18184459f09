"""Which row comes next, so that every batch trains one domain and a recovery phase begins with the next batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from interference_guard.errors import ConfigError
from interference_guard.integrations.orders import ORDERS, planned
from interference_guard.rehearsal import Rehearsal


class DomainOrder:
    """Rows of a data set batch by batch, each of one domain; rows are shuffled within their domain.

    A domain that runs out of rows starts anew, in another order.

    Args:
        domains: Domain of each row.
        prompts: Rows of a batch.
        order: ``"sequential"``: one domain after the other; ``"round_robin"``: a batch of each in turn; or the
            names of the domains in the order they are trained.
        batches: Batches of each domain, one number for all or one by name; by default as many full ones as it
            has rows for.
        rehearsal: Share of each planned batch that is of domains planned before it or not at all, in equal parts;
            not with ``"round_robin"``, and not in the batches of a recovery.
        seed: Of the shuffling.

    Raises:
        ConfigError: If the order or the numbers cannot be served.

    >>> rows = DomainOrder(["math", "math", "code", "code"], prompts=2)
    >>> rows.plan, sorted(rows.row(place) for place in range(2))
    (['math', 'code'], [0, 1])
    """

    def __init__(
        self,
        domains: Sequence[str],
        prompts: int,
        order: str | Sequence[str] = "sequential",
        *,
        batches: int | Mapping[str, int] | None = None,
        rehearsal: float | None = 0.0,
        seed: int = 0,
    ) -> None:
        if rehearsal and order == "round_robin":
            raise ConfigError(
                f"data.domain_rehearsal={rehearsal!r} is not allowed with data.domain_order=round_robin, which "
                "takes domains up again by itself. Take sequential, or a list of domains."
            )
        self.prompts, self.seed = prompts, seed
        self.rows: dict[str, list[int]] = {}
        for index, name in enumerate(domains):
            self.rows.setdefault(name, []).append(index)
        self.plan = self._planned(order, batches)
        self._rehearsal = Rehearsal(self.plan, self.rows, prompts, rehearsal, "data.domain_rehearsal")
        self.present = ""
        self._recovers = False
        self._used = dict.fromkeys(self.rows, 0)
        self._shuffled: dict[str, tuple[int, list[int]]] = {}

    def __len__(self) -> int:
        return len(self.plan) * self.prompts

    def row(self, place: int, recovery: Callable[[], str | None] = lambda: None) -> int:
        """Index of the row at one place; places are asked for in order.

        Args:
            place: From 0 to ``len(self) - 1``.
            recovery: Asked at the first place of each batch for the domain to train in place of the planned one.

        Raises:
            ConfigError: If it names a domain that has no rows.
        """
        number, offset = divmod(place, self.prompts)
        if not offset or not self.present:
            wanted = recovery()
            if wanted is not None and wanted not in self.rows:
                raise ConfigError(
                    f"Domain {wanted!r} must recover and has no rows; data.train_files holds "
                    f"{sorted(self.rows)}. Add its rows: domain_order keeps them out of the planned batches."
                )
            self.present = self.plan[number] if wanted is None else wanted
            self._recovers = wanted is not None
        # A recovery has its batches whole.
        name = self.present if self._recovers else self._rehearsal.batch(number)[offset]
        passes, index = divmod(self._used[name], len(self.rows[name]))
        if self._shuffled.get(name, (-1, []))[0] != passes:
            generator = torch.Generator().manual_seed(
                hash((self.seed, list(self.rows).index(name), passes)) % 2**62
            )
            chosen = torch.randperm(len(self.rows[name]), generator=generator, device="cpu").tolist()
            self._shuffled[name] = passes, [self.rows[name][item] for item in chosen]
        self._used[name] += 1
        return self._shuffled[name][1][index]

    def state_dict(self) -> dict[str, Any]:
        """How many rows of each domain were used, and the present batch's domain."""
        return {"used": dict(self._used), "present": self.present, "recovers": self._recovers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ConfigError: If it is of other domains.
        """
        if set(state["used"]) != set(self.rows):
            raise ConfigError(
                f"The checkpoint's data order is of the domains {sorted(state['used'])}, data.train_files holds "
                f"{sorted(self.rows)}. Resume with the same data."
            )
        self._used, self.present = dict(state["used"]), state["present"]
        self._recovers = state.get("recovers", False)

    def _planned(self, order: str | Sequence[str], batches: int | Mapping[str, int] | None) -> list[str]:
        named = isinstance(order, str)
        if named and order not in ORDERS:
            raise ConfigError(
                f"data.domain_order={order!r} is not allowed: it must be one of {list(ORDERS)} or a list of "
                "domains."
            )
        names = list(self.rows) if named else list(order)
        unknown = [name for name in names if name not in self.rows]
        if unknown or not names:
            raise ConfigError(
                f"data.domain_order={names!r} is not allowed: data.train_files holds rows of {sorted(self.rows)}."
            )
        counts = self._counts(names, batches)
        return planned(order if isinstance(order, str) else "sequential", names, counts)

    def _counts(self, names: Sequence[str], batches: int | Mapping[str, int] | None) -> dict[str, int]:
        if batches is None:
            counts = {name: len(self.rows[name]) // self.prompts for name in names}
        elif isinstance(batches, Mapping):
            if unknown := [name for name in batches if name not in self.rows]:
                raise ConfigError(
                    f"data.domain_batches names {unknown!r}, and data.train_files holds rows of "
                    f"{sorted(self.rows)}. Take one of these names, or leave it out."
                )
            counts = {name: batches.get(name, 0) for name in names}
        else:
            counts = dict.fromkeys(names, batches)
        small = [name for name, count in counts.items() if not isinstance(count, int) or count < 1]
        if small:
            raise ConfigError(
                f"Domain {small[0]!r} has {len(self.rows[small[0]])} rows and would get {counts[small[0]]!r} "
                f"batches of {self.prompts}. Say how many with +data.domain_batches: one number, or one by name."
            )
        return counts
