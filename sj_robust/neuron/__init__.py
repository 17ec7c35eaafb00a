"""DLIF, and how an existing network gets it."""

from sj_robust.neuron.dlif import DLIFNode
from sj_robust.neuron.replacement import ReplacementReport, replace_neurons

__all__ = ["DLIFNode", "ReplacementReport", "replace_neurons"]
