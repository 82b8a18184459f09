"""A small Ray actor between the engine, which sees who must recover, and the data, which chooses the rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from interference_guard.errors import HostError

NAME = "interference_guard_recovery"
# The actor lives as long as this handle: as the process of the trainer, which reads the data.
_own: Any = None


@ray.remote(num_cpus=0)
class Coordinator:
    """Holds the name of the domain to train next.

    Args:
        domains: Domains that have rows.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self._domains = list(domains)
        self._wanted: str | None = None

    def begin(self, domains: Sequence[str]) -> None:
        """Start anew, for another data set."""
        self._domains, self._wanted = list(domains), None

    def domains(self) -> list[str]:
        """Domains that have rows."""
        return self._domains

    def report(self, wanted: str | None) -> None:
        """Say which domain must recover; None to go on as planned."""
        self._wanted = wanted

    def wanted(self) -> str | None:
        """The domain to train next, or None."""
        return self._wanted


def launch(domains: Sequence[str]) -> Link:
    """Start the run's actor; called where the data is read.

    Raises:
        HostError: If another run has one in the same Ray namespace.
    """
    global _own
    if _own is not None and ray.is_initialized():
        with suppress(RayError):
            # A second data set in this process.
            ray.get(_own.begin.remote(list(domains)))
            return Link(_own)
    # A plain class to type checkers, an actor class to Ray.
    actor: Any = Coordinator
    try:
        _own = actor.options(name=NAME).remote(list(domains))
    except ValueError as error:
        raise HostError(
            f"Another run in this Ray namespace has an actor named {NAME!r}, and with guard.recovery=true each "
            "run needs its own. Start the runs in namespaces of their own (+ray_kwargs.ray_init.namespace=...)."
        ) from error
    return Link(_own)


class Link:
    """One end of the connection.

    Args:
        actor: The actor's handle; by default it is looked up by its name.

    Raises:
        HostError: If there is no such actor.
    """

    def __init__(self, actor: Any = None) -> None:
        if actor is None:
            try:
                actor = ray.get_actor(NAME)
            except ValueError as error:
                raise HostError(
                    "guard.recovery=true needs the guard's data set, which trains another domain's rows when one "
                    "must recover. Set data.custom_cls.path=pkg://interference_guard.integrations.verl.dataset "
                    "data.custom_cls.name=DomainDataset data.shuffle=false data.dataloader_num_workers=0."
                ) from error
        self._actor = actor

    def domains(self) -> frozenset[str]:
        """Domains that have rows."""
        return frozenset(self._call("domains"))

    def report(self, wanted: str | None) -> None:
        """Tell the data which domain must recover; it is told when this returns."""
        self._call("report", wanted)

    def wanted(self) -> str | None:
        """Ask which domain must recover."""
        found: str | None = self._call("wanted")
        return found

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments))
        except RayActorError as error:
            raise HostError(
                f"The actor {NAME!r} that carries recovery requests is gone ({error}). Without it no domain "
                "would recover and nobody would notice: resume the run from its last checkpoint."
            ) from error
