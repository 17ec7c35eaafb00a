"""How far a perturbation of the spikes can move the membrane potential."""

from sj_robust.perturbation.gains.certificate import Bound, Certificate, LayerCertificate
from sj_robust.perturbation.gains.certification import perturbation_gains
from sj_robust.perturbation.gains.design import (
    GainDesign,
    gain_penalty,
    gain_scalars,
    optimal_input_gain,
)
from sj_robust.perturbation.gains.gain import (
    NeuronGains,
    l2_gain,
    l2_gain_limit,
    neuron_gains,
    peak_gain,
    printed_gain,
    time_operator,
)
from sj_robust.perturbation.gains.operator import INPUT, InputMap, input_maps

__all__ = [
    "INPUT",
    "Bound",
    "Certificate",
    "GainDesign",
    "InputMap",
    "LayerCertificate",
    "NeuronGains",
    "gain_penalty",
    "gain_scalars",
    "input_maps",
    "l2_gain",
    "l2_gain_limit",
    "neuron_gains",
    "optimal_input_gain",
    "peak_gain",
    "perturbation_gains",
    "printed_gain",
    "time_operator",
]
