"""sj_robust: robustness of spiking neural networks, on SpikingJelly."""

from sj_robust._version import __version__
from sj_robust.classifier import SpikingClassifier
from sj_robust.neuron import DLIFNode, replace_neurons

__all__ = ["DLIFNode", "SpikingClassifier", "__version__", "replace_neurons"]
