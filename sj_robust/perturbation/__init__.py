"""Perturbation of the membrane potential between a clean and a perturbed run of one network."""

from sj_robust.perturbation.dynamics import (
    membrane_potential,
    ms_mppd,
    simplified_perturbation,
    tasad,
)
from sj_robust.perturbation.intensity import IntensityCorrelation, intensity_correlation
from sj_robust.perturbation.monitor import MPPDMonitor, compare_potentials
from sj_robust.perturbation.traces import spike_traces

__all__ = [
    "IntensityCorrelation",
    "MPPDMonitor",
    "compare_potentials",
    "intensity_correlation",
    "membrane_potential",
    "ms_mppd",
    "simplified_perturbation",
    "spike_traces",
    "tasad",
]
