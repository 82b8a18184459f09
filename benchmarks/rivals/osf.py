"""Orthogonal subspace fine-tuning as PEFT has it, decomposed anew for each domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import OSFConfig, get_peft_model

from interference_guard.integrations.trl import order_by_domain

from ..bed.method import Method, Rows, tensor_bytes


class OSF(Method):
    """`strength` is the share of singular directions that are frozen in each domain's phase."""

    def plan(self, rows: Rows) -> list[Dataset]:
        order = {"batches": self.run.steps, "seed": self.run.seed}
        return [
            order_by_domain(Dataset.from_list(list(rows[name])), self.bed.prompts, "sequential", **order)
            for name in self.run.order
        ]

    def policy(self, student: Any, folder: Path) -> Any:
        config = OSFConfig(effective_rank=float(self.run.strength), target_modules="all-linear")
        policy = get_peft_model(student, config)
        # What is frozen is kept in factors beside the weights' own place.
        whole = tensor_bytes(list(student.parameters()))
        self.extra = tensor_bytes([list(policy.parameters()), list(policy.buffers())]) - whole
        return policy

    def release(self, policy: Any) -> Any:
        student = policy.merge_and_unload()
        for parameter in student.parameters():
            parameter.requires_grad_(True)
        return student

    def bytes(self) -> int:
        return max(self.extra, 0)
