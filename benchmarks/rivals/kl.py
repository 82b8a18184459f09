"""KL to the phase's start: TRL's own `beta`, its reference model set to the weights each phase begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bed.method import tensor_bytes
from .phased import Phased


class PhaseKL(Phased):
    """`strength` is `beta`; in the first phase too, as there is one `beta` for all."""

    def arguments(self) -> dict[str, Any]:
        return {"beta": float(self.run.strength)}

    def policy(self, student: Any, folder: Path) -> Any:
        # The trainer loads its reference model from where the policy says that it came from.
        student.save_pretrained(folder)
        student.config._name_or_path = student.name_or_path = str(folder)
        return student

    def begin(self, phase: int) -> None:
        self.trainer.ref_model.load_state_dict(self.model.state_dict())

    def bytes(self) -> int:
        return tensor_bytes(list(self.trainer.ref_model.parameters()))
