"""Published defences of spiking networks: neurons, encoders, gates and penalties, one file each."""

from sj_robust.defences.clipped_relu import ClippedReLU
from sj_robust.defences.dsd import deflate_
from sj_robust.defences.feel import EvolvingLeakNode, FrequencyEncoder
from sj_robust.defences.hosnn import HomeostaticNode
from sj_robust.defences.mpd_sgr import SurrogateOverlap
from sj_robust.defences.rsc import SmoothingEncoder
from sj_robust.defences.stod import OrthogonalEncoder
from sj_robust.defences.stog import StochasticGate
from sj_robust.defences.tgo import NoisyLIFNode

__all__ = [
    "ClippedReLU",
    "EvolvingLeakNode",
    "FrequencyEncoder",
    "HomeostaticNode",
    "NoisyLIFNode",
    "OrthogonalEncoder",
    "SmoothingEncoder",
    "StochasticGate",
    "SurrogateOverlap",
    "deflate_",
]
