"""Batches in which some rows are of domains that were trained before, so that these are trained on and kept."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ConfigError


def batch_domains(present: str, earlier: Sequence[str], number: int, prompts: int, share: float) -> list[str]:
    """The domain of each prompt of a batch.

    Rows of earlier domains are spread evenly over the batch, so that its parts (mini-batches, ranks) have the
    same share of them, and over batches evenly over the domains.

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


def check_rehearsal(share: float, prompts: int, setting: str = "rehearsal") -> None:
    """Check the share of rows of earlier domains.

    Args:
        share: The share.
        prompts: Of a batch.
        setting: What the host calls it.

    Raises:
        ConfigError: If it is not from 0 to below a half, or is less than one prompt.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 0.5:
        raise ConfigError(
            f"{setting}={share!r} is not allowed: it is the share of a batch's prompts that are of earlier "
            "domains, from 0 to below 0.5."
        )
    if share and not round(share * prompts):
        raise ConfigError(
            f"{setting}={share!r} is less than one of a batch of {prompts} prompts. "
            f"Take {1 / prompts:.3g} or more."
        )


def check_active_share(share: float, active_share: float, setting: str = "rehearsal") -> None:
    """Check that rows of earlier domains leave these protected, and that the present one counts as trained.

    Args:
        share: Of rows of earlier domains.
        active_share: The guard's setting.
        setting: What the host calls `share`.

    Raises:
        ConfigError: If not.
    """
    if share and not share < active_share <= 1 - share:
        raise ConfigError(
            f"{setting}={share!r} with active_share={active_share!r} is not allowed: one earlier domain can have "
            f"all of that share, and a domain with active_share of a batch's rows is not protected. Set "
            f"active_share above {share!r} and at most {1 - share:.3g}; 0.5 leaves room on both sides."
        )
