"""Plain training with a trainer for each domain: what methods that need that are compared with."""

from __future__ import annotations

from datasets import Dataset

from interference_guard.integrations.trl import order_by_domain

from ..bed.method import Method, Rows


class Separate(Method):
    """A trainer, and so an optimizer, of its own for each domain."""

    def plan(self, rows: Rows) -> list[Dataset]:
        order = {"batches": self.run.steps, "seed": self.run.seed}
        return [
            order_by_domain(Dataset.from_list(list(rows[name])), self.bed.prompts, "sequential", **order)
            for name in self.run.order
        ]
