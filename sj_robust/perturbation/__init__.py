"""Perturbation of the membrane potential between a clean and a perturbed run of one network."""

from sj_robust.perturbation._statistics import LayerStats, LayerTrace, MPPDStatistics
from sj_robust.perturbation.dynamics import (
    full_perturbation,
    membrane_potential,
    ms_mppd,
    simplified_perturbation,
    spike_train_distance,
    tasad,
)
from sj_robust.perturbation.indicators import neuron_indicators, sample_indicators
from sj_robust.perturbation.intensity import (
    IntensityCorrelation,
    Perturbation,
    intensity_correlation,
)
from sj_robust.perturbation.monitor import MPPDMonitor, compare_potentials
from sj_robust.perturbation.traces import Traces, spike_traces

__all__ = [
    "IntensityCorrelation",
    "LayerStats",
    "LayerTrace",
    "MPPDMonitor",
    "MPPDStatistics",
    "Perturbation",
    "Traces",
    "compare_potentials",
    "full_perturbation",
    "intensity_correlation",
    "membrane_potential",
    "ms_mppd",
    "neuron_indicators",
    "sample_indicators",
    "simplified_perturbation",
    "spike_traces",
    "spike_train_distance",
    "tasad",
]
