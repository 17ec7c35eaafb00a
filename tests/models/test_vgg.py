import pytest
import torch
from spikingjelly.activation_based import layer

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.models import VGG, VGG_FEATURES, NetworkSpec, build_network

CONVOLUTIONS = {"vgg5": 3, "vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16}


@pytest.mark.parametrize("name", VGG_FEATURES)
def test_layers_as_in_the_paper(name):
    net = build_network(NetworkSpec(name, image_shape=(3, 32, 32), classes=10, T=2, hidden=(24, 20)))
    kinds = [type(module) for module in net.modules()]
    assert kinds.count(layer.Conv2d) == kinds.count(layer.BatchNorm2d) == CONVOLUTIONS[name]
    assert kinds.count(DLIFNode) == CONVOLUTIONS[name] + 2
    assert kinds.count(layer.Linear) == 3
    linear = next(module for module in net.modules() if isinstance(module, layer.Linear))
    poolings = VGG_FEATURES[name].count("A")
    assert linear.in_features == [f for f in VGG_FEATURES[name] if f != "A"][-1] * (32 // 2**poolings) ** 2
    with torch.no_grad():
        assert SpikingClassifier(net, T=2)(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_the_paper_has_two_hidden_layers_of_4096():
    with torch.device("meta"):
        net = VGG("vgg11", (3, 32, 32), 100, T=8, spiking_neuron=DLIFNode)
    shapes = [tuple(module.weight.shape) for module in net.modules() if isinstance(module, layer.Linear)]
    assert shapes == [(4096, 512 * 4 * 4), (4096, 4096), (100, 4096)]


def test_wrong_use():
    with pytest.raises(ValueError, match="name must be one of vgg5, vgg11"):
        VGG("vgg12", (3, 32, 32), 10, T=2, spiking_neuron=DLIFNode)
    with pytest.raises(ValueError, match="cannot be halved 5 times"):
        VGG("vgg16", (3, 16, 16), 10, T=2, spiking_neuron=DLIFNode)
