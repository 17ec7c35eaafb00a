"""sj_robust: robustness of spiking neural networks, on SpikingJelly."""

from sj_robust._version import __version__
from sj_robust.classifier import SpikingClassifier
from sj_robust.neuron import DLIFNode, replace_neurons
from sj_robust.perturbation import MPPDMonitor

__all__ = ["DLIFNode", "MPPDMonitor", "SpikingClassifier", "__version__", "replace_neurons"]
