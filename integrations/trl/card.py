"""The guard's section in the trainer's own model card."""

from __future__ import annotations

import math
from pathlib import Path

from huggingface_hub import ModelCard

from interference_guard.files import SECTION_BEGIN, SECTION_END, replacing, without_section
from interference_guard.guard import Guard
from interference_guard.telling import warn

TAG = "interference-guard"


def section(guard: Guard) -> str:
    """The guard's summary as Markdown: each domain's reward at its anchor and its last measurement."""
    rows = ["| domain | reward at the anchor | measured interference |", "|---|---|---|"]
    for name, state in guard.domains.items():
        # Domains that are trained or given without rewards have none at their anchor.
        known = "-" if math.isnan(state.anchor_reward) else f"{state.anchor_reward:.3f}"
        reward = known if state.anchored else "in training"
        found = state.measurement
        unit = "" if found is None or found.ratio != "nats" else " nats"
        rows.append(f"| {_plain(name)} | {reward} | {'-' if found is None else f'{found.loss:.3f}{unit}'} |")
    budget = f"Budget {guard.config.budget:g} of a domain's reward range, after {guard.steps} steps."
    return "\n".join([SECTION_BEGIN, "## Interference between domains", "", budget, "", *rows, SECTION_END])


def add_section(path: Path, guard: Guard) -> None:
    """Put the section and a tag into a card that exists; an earlier section is replaced.

    A fault is a warning: the card is the trainer's, and so is its run.
    """
    try:
        card = ModelCard.load(path, ignore_metadata_errors=True)
        card.text = without_section(card.text).rstrip() + "\n\n" + section(guard) + "\n"
        card.data.tags = sorted({*(card.data.tags or ()), TAG})
        with replacing(path) as new:
            card.save(new)
    except Exception as error:
        warn(f"The guard's section could not be added to the model card {path}: {error}.")


def _plain(name: str) -> str:
    # A bar would end the table's cell.
    return name.replace("|", "\\|").replace("\n", " ")
