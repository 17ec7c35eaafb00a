"""The training objective, the epoch loop with Accelerate, and checkpoints; needs the extra
``recipes``.
"""

# says what to install if one of its packages is missing
import sj_robust.core.recipes_installed  # noqa: F401
from sj_robust.defences.penalty import ForwardPasses, Penalty
from sj_robust.defences.stod import TemporalOrthogonality
from sj_robust.defences.tgo import ThresholdGuarding
from sj_robust.models.checkpoint import load_checkpoint, save_checkpoint
from sj_robust.training.certified import CertifiedOptions
from sj_robust.training.conversion import convert
from sj_robust.training.engine import NonFiniteLossError, TrainingInterrupted, TrainingPlan, train
from sj_robust.training.finetuning import finetune
from sj_robust.training.journal import Journal
from sj_robust.training.modes import MODES, event_attacks, training_attack, validation_attacks
from sj_robust.training.objective import Objective
from sj_robust.training.penalties import GradientSparsity, StabilityGain, WeightMagnitude, retract_

__all__ = [
    "MODES",
    "CertifiedOptions",
    "ForwardPasses",
    "GradientSparsity",
    "Journal",
    "NonFiniteLossError",
    "Objective",
    "Penalty",
    "StabilityGain",
    "TemporalOrthogonality",
    "ThresholdGuarding",
    "TrainingInterrupted",
    "TrainingPlan",
    "WeightMagnitude",
    "convert",
    "event_attacks",
    "finetune",
    "load_checkpoint",
    "retract_",
    "save_checkpoint",
    "train",
    "training_attack",
    "validation_attacks",
]
