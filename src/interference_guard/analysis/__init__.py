"""The paper's measurements on saved checkpoints, streamed tensor by tensor; needs no trainer."""

from interference_guard.protected import jaccard

from .checkpoints import Checkpoint, check_same, open_checkpoint
from .conflict import Conflict, conflict_subspace
from .edits import Edits, measure_edits, top_neurons
from .gradients import GradientCosines, gradient_cosines, stored_gradients
from .merged import MergedCheckpoint
from .prediction import Prediction, predict_interference
from .rewriting import write_rollback
from .rollback import RollbackPlan, plan_rollback
from .routes import Routes, active_neurons, compare_routes
from .state import DomainRecord, StateFile

__all__ = [
    "Checkpoint",
    "Conflict",
    "DomainRecord",
    "Edits",
    "GradientCosines",
    "MergedCheckpoint",
    "Prediction",
    "RollbackPlan",
    "Routes",
    "StateFile",
    "active_neurons",
    "check_same",
    "compare_routes",
    "conflict_subspace",
    "gradient_cosines",
    "jaccard",
    "measure_edits",
    "open_checkpoint",
    "plan_rollback",
    "predict_interference",
    "stored_gradients",
    "top_neurons",
    "write_rollback",
]
