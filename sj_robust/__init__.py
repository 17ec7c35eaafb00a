"""sj_robust: robustness of spiking neural networks, on SpikingJelly."""

from sj_robust.classifier import SpikingClassifier
from sj_robust.neuron import DLIFNode, replace_neurons

__version__ = "0.1.0"

__all__ = ["DLIFNode", "SpikingClassifier", "__version__", "replace_neurons"]
