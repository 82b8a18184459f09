"""Orthogonal subspace fine-tuning as PEFT has it, decomposed anew for each domain."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peft import OSFConfig, get_peft_model

from ..bed.method import tensor_bytes
from .separate import Separate


class OSF(Separate):
    """`strength` is the share of singular directions that are frozen in each domain's phase.

    ``"progressive"`` is the share of domains that are trained, as PEFT's documentation advises. The first domain
    is trained with all weights: there is no earlier one.
    """

    phase, extra = 0, 0

    def policy(self, student: Any, folder: Path) -> Any:
        share = self.phase / len(self.run.order) if self.run.strength == "progressive" else self.run.strength
        self.phase += 1
        if self.phase == 1:
            return student
        # Taken first: the wrapper changes the model in place.
        whole = tensor_bytes(list(student.parameters()))
        started = time.perf_counter()
        policy = get_peft_model(student, OSFConfig(effective_rank=float(share), target_modules="all-linear"))
        self.seconds += time.perf_counter() - started
        # What is frozen is kept in factors beside the weights' own place.
        self.extra = tensor_bytes([list(policy.parameters()), list(policy.buffers())]) - whole
        return policy

    def release(self, policy: Any) -> Any:
        if self.phase == 1:
            return policy
        started = time.perf_counter()
        student = policy.merge_and_unload()
        for parameter in student.parameters():
            parameter.requires_grad_(True)
        self.seconds += time.perf_counter() - started
        return student

    def bytes(self) -> int:
        return self.extra
