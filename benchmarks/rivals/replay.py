"""Replay: a share of every batch is rows of earlier domains."""

from __future__ import annotations

import torch
from datasets import Dataset

from ..bed.method import Guarded, Method, Rows


class Replay(Method):
    """`strength` is the share of a batch's prompts that are drawn from all earlier domains alike."""

    def plan(self, rows: Rows) -> list[Dataset]:
        generator = torch.Generator().manual_seed(self.run.seed)

        def draw(names: tuple[str, ...], count: int) -> list[dict[str, str]]:
            which = torch.randint(len(names), (count,), generator=generator).tolist()
            return [
                rows[names[i]][int(torch.randint(len(rows[names[i]]), (), generator=generator))] for i in which
            ]

        chosen = []
        for phase, name in enumerate(self.run.order):
            old = round(float(self.run.strength) * self.bed.prompts) if phase else 0
            for _ in range(self.run.steps):
                chosen += draw((name,), self.bed.prompts - old) + draw(self.run.order[: max(phase, 1)], old)
        return [Dataset.from_list(chosen)]


class GuardedReplay(Replay, Guarded):
    """The same rows with the guard beside them, which protects earlier domains also while they are replayed."""
