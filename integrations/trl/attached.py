"""What attaching the callback to one trainer makes, and detaching lets go of."""

from __future__ import annotations

from collections.abc import Callable

from interference_guard.guard import Guard

from .checkpoints import Checkpoints
from .completions import trainer_policy
from .engines import guarded_model
from .evaluation import EvaluationRounds
from .passing import PassingRows
from .recovery import RecoveryRows
from .rows import DomainTable
from .seams import Seams


class Attached:
    """A trainer, and what follows its checkpoints, its rows and its evaluations for the guard.

    Args:
        seams: The trainer's methods, to be wrapped.
        guard: The callback's guard, which outlives this.
        domains: Numbers the domains.
        heard: Called with the mean reward by domain of each round of evaluation.
        recovery: Rows of recovery phases, None where there are to be none.
    """

    def __init__(
        self,
        seams: Seams,
        guard: Guard,
        domains: DomainTable,
        heard: Callable[[dict[str, float]], None],
        recovery: RecoveryRows | None = None,
    ) -> None:
        self.seams, self.trainer, self.guard, self.domains = seams, seams.trainer, guard, domains
        self.recovery: RecoveryRows | None = None
        # The first, since it may warn: where warnings are errors, nothing is wrapped by then.
        self.checkpoints = Checkpoints(seams, guard, self.bind)
        if recovery is not None:
            self.recover_from(recovery)
        self.rows = PassingRows(seams, guard, domains, EvaluationRounds(seams, heard))

    def recover_from(self, rows: RecoveryRows) -> None:
        """Take the rows of recovery phases from these."""
        self.recovery = rows
        self.domains.add(sorted(rows.domains))
        self.guard.recoverable = rows.domains

    def bind(self) -> None:
        """Give the guard the trainer's model, which may have been sharded since the callback was attached."""
        self.guard.bind(guarded_model(self.trainer))
        self.guard.policy = trainer_policy(self.trainer)
