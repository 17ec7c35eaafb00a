"""DLIF neurons, their use in existing networks, and layers that run in one pass with them."""

from sj_robust.neuron.dlif import DLIFNode
from sj_robust.neuron.fusion import fuse, unfuse
from sj_robust.neuron.replacement import dlif_to_lif, replace_neurons
from sj_robust.neuron.stage import Stage

__all__ = ["DLIFNode", "Stage", "dlif_to_lif", "fuse", "replace_neurons", "unfuse"]
