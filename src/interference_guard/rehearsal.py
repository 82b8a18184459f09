"""Batches in which some rows are of domains that were trained before, so that these are trained on and kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .errors import ConfigError


class Rehearsal:
    """Which domain each prompt of each batch of a plan is of.

    Earlier domains have equal parts of a batch's share, in turn, spread evenly over it. Those that have rows and
    are not in the plan were trained before it.

    Args:
        plan: The domain in training, by batch.
        domains: Those that have rows.
        prompts: Of a batch.
        share: Part of them that is of earlier domains, rounded to whole prompts; None is 0.
        setting: What the host calls the share.

    Raises:
        ConfigError: If the share is none, or no domain comes before another.

    >>> Rehearsal(["math", "code"], ["math", "code"], prompts=8, share=0.25).batch(1)
    ['code', 'code', 'math', 'code', 'code', 'code', 'math', 'code']
    """

    def __init__(
        self,
        plan: Sequence[str],
        domains: Iterable[str],
        prompts: int,
        share: float | None = 0.0,
        setting: str = "rehearsal",
    ) -> None:
        self.plan, self.prompts, self.count = plan, prompts, rehearsed_prompts(share, prompts, setting)
        planned = set(plan)
        self._first = {name: -1 for name in domains if name not in planned}
        for number, name in enumerate(plan):
            self._first.setdefault(name, number)
        if self.count and (not plan or len(self._first) < 2):
            raise ConfigError(
                f"{setting}={share!r} has no domain to rehearse: there are rows of {list(self._first)}, and the "
                f"plan trains {sorted(planned)}. Add rows of domains that were trained before, and plan no "
                "batches of them."
            )

    def batch(self, number: int) -> list[str]:
        """The domain of each prompt of a batch, ``prompts`` names."""
        present = self.plan[number]
        names = [present] * self.prompts
        earlier = [name for name, first in self._first.items() if first < number and name != present]
        for index in range(self.count if earlier else 0):
            place = (2 * index + 1) * self.prompts // (2 * self.count)
            names[place] = earlier[(number * self.count + index) % len(earlier)]
        return names


def rehearsed_prompts(share: float | None, prompts: int, setting: str = "rehearsal") -> int:
    """How many of a batch's prompts a share of earlier domains is; None is 0.

    Raises:
        ConfigError: If it is not from 0 to below a half, in whole prompts too, or is less than one prompt.
    """
    share = 0.0 if share is None else share
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 0.5:
        raise ConfigError(
            f"{setting}={share!r} is not allowed: it is the share of a batch's prompts that are of earlier "
            "domains, from 0 to below 0.5."
        )
    count = round(share * prompts)
    if share and not 0 < 2 * count < prompts:
        most = (prompts - 1) // 2
        allowed = f"from {1 / prompts:.3g} to {most / prompts:.3g}" if most else "none; take batches of 3 or more"
        raise ConfigError(
            f"{setting}={share!r} is {count} of a batch of {prompts} prompts. It must be at least one of them "
            f"and less than half. Allowed here: {allowed}."
        )
    return count


def check_active_share(
    share: float | None, prompts: int, active_share: float, setting: str = "rehearsal"
) -> None:
    """Check that rows of earlier domains leave these protected, and that the present one counts as trained.

    Args:
        share: Of rows of earlier domains; None is 0.
        prompts: Of a batch.
        active_share: The guard's setting.
        setting: What the host calls `share`.

    Raises:
        ConfigError: If not, or for a share that `rehearsed_prompts` refuses.
    """
    part = rehearsed_prompts(share, prompts, setting) / prompts
    if part and not part < active_share <= 1 - part:
        raise ConfigError(
            f"{setting}={share!r} with active_share={active_share!r} is not allowed: one earlier domain can have "
            f"all of that share, {part:.3g} in whole prompts, and with active_share of a batch's rows it is not "
            f"protected. Set active_share above {part:.3g} and at most {1 - part:.3g}; 0.5 is always right."
        )
