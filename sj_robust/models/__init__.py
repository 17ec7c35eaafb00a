"""Spiking networks for the recipes, on SpikingJelly's layers, with any spiking neuron."""

from sj_robust.models.build import NETWORKS, NetworkSpec, build_classifier, build_network
from sj_robust.models.chain import VGG, VGG_FEATURES, ConvChain, FullyConnected, SmallConvNet
from sj_robust.models.direct import DirectlyEncoded
from sj_robust.models.published_checkpoint import load_published_checkpoint, published_names
from sj_robust.models.shipped import PretrainedCard, pretrained, pretrained_networks
from sj_robust.models.start import start_from
from sj_robust.models.time_steps import set_time_steps
from sj_robust.models.wide_resnet import WIDE_RESNETS, MixedBlock, WideResNet
from sj_robust.models.zoo import build_zoo_network, zoo_networks

__all__ = [
    "NETWORKS",
    "VGG",
    "VGG_FEATURES",
    "WIDE_RESNETS",
    "ConvChain",
    "DirectlyEncoded",
    "FullyConnected",
    "MixedBlock",
    "NetworkSpec",
    "PretrainedCard",
    "SmallConvNet",
    "WideResNet",
    "build_classifier",
    "build_network",
    "build_zoo_network",
    "load_published_checkpoint",
    "pretrained",
    "pretrained_networks",
    "published_names",
    "set_time_steps",
    "start_from",
    "zoo_networks",
]
