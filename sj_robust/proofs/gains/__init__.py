"""How far a perturbation of the spikes can move the membrane potential."""

from sj_robust.proofs.gains.certificate import Certificate
from sj_robust.proofs.gains.certification import perturbation_gains
from sj_robust.proofs.gains.design import gain_penalty, optimal_input_gain
from sj_robust.proofs.gains.gain import l2_gain, l2_gain_limit, peak_gain, printed_gain
from sj_robust.proofs.gains.operator import input_maps

__all__ = [
    "Certificate",
    "gain_penalty",
    "input_maps",
    "l2_gain",
    "l2_gain_limit",
    "optimal_input_gain",
    "peak_gain",
    "perturbation_gains",
    "printed_gain",
]
