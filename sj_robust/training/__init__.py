"""The objective, the epoch loop on Accelerate, and checkpoints; needs the extra ``recipes``."""

# says what to install if one of its packages is missing
import sj_robust.core.recipes_installed  # noqa: F401
from sj_robust.models.checkpoint import load_checkpoint, save_checkpoint
from sj_robust.training.certified import CertifiedLoss, CertifiedOptions
from sj_robust.training.engine import (
    NonFiniteLossError,
    TrainingInterrupted,
    TrainingPlan,
    check_training,
    train,
)
from sj_robust.training.folder import open_run_folder, removed_if_unused, run_to_resume
from sj_robust.training.history import EpochRecord, catastrophic_overfitting
from sj_robust.training.journal import Journal
from sj_robust.training.modes import (
    MODES,
    Mode,
    final_attacks,
    flip_attacks,
    make_penalties,
    training_attack,
    validation_attacks,
)
from sj_robust.training.objective import Losses, Objective
from sj_robust.training.penalties import (
    ForwardPasses,
    GradientSparsity,
    Penalty,
    StabilityGain,
    ThresholdGuarding,
    WeightMagnitude,
)
from sj_robust.training.processes import first_process_first, make_accelerator
from sj_robust.training.regularization import project_to_simplex_, retract_
from sj_robust.training.validation import check_start, final_report

__all__ = [
    "MODES",
    "CertifiedLoss",
    "CertifiedOptions",
    "EpochRecord",
    "ForwardPasses",
    "GradientSparsity",
    "Journal",
    "Losses",
    "Mode",
    "NonFiniteLossError",
    "Objective",
    "Penalty",
    "StabilityGain",
    "ThresholdGuarding",
    "TrainingInterrupted",
    "TrainingPlan",
    "WeightMagnitude",
    "catastrophic_overfitting",
    "check_start",
    "check_training",
    "final_attacks",
    "final_report",
    "first_process_first",
    "flip_attacks",
    "load_checkpoint",
    "make_accelerator",
    "make_penalties",
    "open_run_folder",
    "project_to_simplex_",
    "removed_if_unused",
    "retract_",
    "run_to_resume",
    "save_checkpoint",
    "train",
    "training_attack",
    "validation_attacks",
]
