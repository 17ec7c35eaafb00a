"""The objective, the epoch loop on Accelerate, and checkpoints; needs the extra ``recipes``."""

from sj_robust.training.checkpoint import load_checkpoint, save_checkpoint
from sj_robust.training.engine import NonFiniteLossError, TrainingInterrupted, TrainingPlan, train
from sj_robust.training.folder import open_run_folder, run_to_resume
from sj_robust.training.history import EpochRecord, catastrophic_overfitting
from sj_robust.training.journal import Journal
from sj_robust.training.objective import Losses, Objective

__all__ = [
    "EpochRecord",
    "Journal",
    "Losses",
    "NonFiniteLossError",
    "Objective",
    "TrainingInterrupted",
    "TrainingPlan",
    "catastrophic_overfitting",
    "load_checkpoint",
    "open_run_folder",
    "run_to_resume",
    "save_checkpoint",
    "train",
]
