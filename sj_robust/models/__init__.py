"""Spiking networks for the recipes, on SpikingJelly's layers, with any spiking neuron."""

from sj_robust.models.build import NETWORKS, NetworkSpec, build_network
from sj_robust.models.chain import ConvChain
from sj_robust.models.small import SmallConvNet
from sj_robust.models.vgg import VGG, VGG_FEATURES

__all__ = ["NETWORKS", "VGG", "VGG_FEATURES", "ConvChain", "NetworkSpec", "SmallConvNet", "build_network"]
