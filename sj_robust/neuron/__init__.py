"""DLIF, how an existing network gets it, and layers that run in one pass with it."""

from sj_robust.neuron.dlif import DLIFNode
from sj_robust.neuron.fusion import FusedSequential, FusionReport, fuse, unfuse
from sj_robust.neuron.replacement import ReplacementReport, dlif_to_lif, replace_neurons

__all__ = [
    "DLIFNode",
    "FusedSequential",
    "FusionReport",
    "ReplacementReport",
    "dlif_to_lif",
    "fuse",
    "replace_neurons",
    "unfuse",
]
