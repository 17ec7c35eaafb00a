"""Bounds on how far a perturbation of the spikes can move the membrane potential, and what they do
not cover.
"""

from sj_robust.stability.certificate import Bound, Certificate, LayerCertificate
from sj_robust.stability.certification import certify
from sj_robust.stability.design import GainDesign, gain_penalty, gain_scalars, optimal_input_gain
from sj_robust.stability.gain import (
    NeuronGains,
    l2_gain,
    l2_gain_limit,
    neuron_gains,
    peak_gain,
    printed_gain,
    time_operator,
)
from sj_robust.stability.no_flip import no_flip_radius
from sj_robust.stability.operator import INPUT, InputMap, input_maps
from sj_robust.stability.smoothing import SmoothedClassifier, Smoothing, smooth
from sj_robust.stability.soundness import UnsoundBoundsError
from sj_robust.stability.verification import BoundedLayer, Verification, verify

__all__ = [
    "INPUT",
    "Bound",
    "BoundedLayer",
    "Certificate",
    "GainDesign",
    "InputMap",
    "LayerCertificate",
    "NeuronGains",
    "SmoothedClassifier",
    "Smoothing",
    "UnsoundBoundsError",
    "Verification",
    "certify",
    "gain_penalty",
    "gain_scalars",
    "input_maps",
    "l2_gain",
    "l2_gain_limit",
    "neuron_gains",
    "no_flip_radius",
    "optimal_input_gain",
    "peak_gain",
    "printed_gain",
    "smooth",
    "time_operator",
    "verify",
]
