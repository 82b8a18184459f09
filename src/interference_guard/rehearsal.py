"""Batches in which some rows are of domains that were trained before, so that these are trained on and kept."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ConfigError


def batch_domains(present: str, earlier: Sequence[str], number: int, prompts: int, share: float) -> list[str]:
    """The domain of each prompt of a batch.

    Rows of earlier domains are spread evenly over the batch, and over batches evenly over the domains.

    Args:
        present: The domain in training.
        earlier: Those trained before it.
        number: Of the batch, from 0.
        prompts: Of the batch.
        share: Part of them that is of earlier domains, rounded to whole prompts.

    Returns:
        ``prompts`` names.

    >>> batch_domains("code", ["math", "qa"], number=0, prompts=8, share=0.25)
    ['code', 'code', 'math', 'code', 'code', 'code', 'qa', 'code']
    """
    names = [present] * prompts
    count = round(share * prompts) if earlier else 0
    for index in range(count):
        names[(2 * index + 1) * prompts // (2 * count)] = earlier[(number * count + index) % len(earlier)]
    return names


def checked_share(share: float | None, prompts: int, setting: str = "rehearsal") -> float:
    """Check the share of rows of earlier domains.

    Args:
        share: The share; None is 0.
        prompts: Of a batch.
        setting: What the host calls it.

    Returns:
        Which part of a batch is of earlier domains, in whole prompts.

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
    return count / prompts


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
        ConfigError: If not, or for a share that `checked_share` refuses.
    """
    part = checked_share(share, prompts, setting)
    if part and not part < active_share <= 1 - part:
        raise ConfigError(
            f"{setting}={share!r} with active_share={active_share!r} is not allowed: one earlier domain can have "
            f"all of that share, {part:.3g} in whole prompts, and with active_share of a batch's rows it is not "
            f"protected. Set active_share above {part:.3g} and at most {1 - part:.3g}; 0.5 is always right."
        )
