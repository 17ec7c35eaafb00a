"""Spiking networks for the recipes, on SpikingJelly's layers, with any spiking neuron."""

from sj_robust.models.build import NetworkSpec, build_classifier, build_network
from sj_robust.models.chain import VGG, ConvChain, FullyConnected
from sj_robust.models.shipped import pretrained, pretrained_networks
from sj_robust.models.start import start_from
from sj_robust.models.time_steps import set_time_steps
from sj_robust.models.weights import load_published_checkpoint
from sj_robust.models.wide_resnet import WideResNet
from sj_robust.models.zoo import zoo_networks

__all__ = [
    "VGG",
    "ConvChain",
    "FullyConnected",
    "NetworkSpec",
    "WideResNet",
    "build_classifier",
    "build_network",
    "load_published_checkpoint",
    "pretrained",
    "pretrained_networks",
    "set_time_steps",
    "start_from",
    "zoo_networks",
]
