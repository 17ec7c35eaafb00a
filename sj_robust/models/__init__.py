"""Spiking networks for the recipes, on SpikingJelly's layers, with any spiking neuron."""

from sj_robust.models.build import NetworkSpec, build_network
from sj_robust.models.small import SmallConvNet

__all__ = ["NetworkSpec", "SmallConvNet", "build_network"]
