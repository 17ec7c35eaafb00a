"""Perturbation of the membrane potential between a clean and a perturbed run of one network."""

from sj_robust.perturbation._statistics import LayerStats, LayerTrace
from sj_robust.perturbation.dynamics import (
    full_perturbation,
    membrane_potential,
    ms_mppd,
    simplified_perturbation,
    spike_train_distance,
    tasad,
)
from sj_robust.perturbation.monitor import MPPDMonitor

__all__ = [
    "LayerStats",
    "LayerTrace",
    "MPPDMonitor",
    "full_perturbation",
    "membrane_potential",
    "ms_mppd",
    "simplified_perturbation",
    "spike_train_distance",
    "tasad",
]
