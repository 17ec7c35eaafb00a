from itertools import pairwise

import pytest
import torch
from spikingjelly.activation_based import layer

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.models import VGG, VGG_FEATURES, ConvChain, NetworkSpec, SmallConvNet, build_network

CONVOLUTIONS = {"vgg5": 3, "vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16}


def small(spiking_neuron=DLIFNode, step_mode="m", shape=(3, 9, 12)):
    torch.manual_seed(0)
    return SmallConvNet(
        shape, 7, T=4, spiking_neuron=spiking_neuron, channels=(4, 6), step_mode=step_mode
    ).eval()


@pytest.mark.parametrize("name", VGG_FEATURES)
def test_layers_of_vgg_as_in_the_paper(name):
    net = build_network(
        NetworkSpec(name, image_shape=(3, 32, 32), classes=10, T=2, hidden=(24, 20))
    )
    kinds = [type(module) for module in net.modules()]
    assert kinds.count(layer.Conv2d) == kinds.count(layer.BatchNorm2d) == CONVOLUTIONS[name]
    assert kinds.count(DLIFNode) == CONVOLUTIONS[name] + 2
    assert kinds.count(layer.Linear) == 3
    linear = next(module for module in net.modules() if isinstance(module, layer.Linear))
    poolings = VGG_FEATURES[name].count("A")
    assert (
        linear.in_features
        == [f for f in VGG_FEATURES[name] if f != "A"][-1] * (32 // 2**poolings) ** 2
    )
    with torch.no_grad():
        assert SpikingClassifier(net, T=2)(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_vgg11_has_the_sizes_of_the_paper():
    with torch.device("meta"):
        net = VGG("vgg11", (3, 32, 32), 10, T=8, spiking_neuron=DLIFNode)
    shapes = [
        tuple(module.weight.shape) for module in net.modules() if isinstance(module, layer.Linear)
    ]
    assert shapes == [(4096, 512 * 4 * 4), (4096, 4096), (10, 4096)]
    convolutions = sum(
        9 * a * b + b + 2 * b for a, b in pairwise([3, 64, 128, 256, 512, 512, 512, 512, 512])
    )
    assert sum(p.numel() for p in net.parameters()) == convolutions + sum(
        a * b + a for a, b in shapes
    ) + 8 * (8 + 2)


@pytest.mark.parametrize(
    ("strides", "kernel_size", "features"), [((1, 2), 3, 6 * 5 * 6), ((2, 2), 4, 6 * 2 * 3)]
)
def test_strides_in_the_place_of_poolings_and_no_batch_norm(strides, kernel_size, features):
    options = {"strides": list(strides), "kernel_size": kernel_size, "batch_norm": False}
    spec = NetworkSpec(image_shape=(3, 9, 12), classes=7, channels=(4, 6), options=options)
    net = build_network(spec)
    modules = list(net.modules())
    assert not any(isinstance(module, layer.BatchNorm2d | layer.AvgPool2d) for module in modules)
    convolutions = [module for module in modules if isinstance(module, layer.Conv2d)]
    assert [module.stride for module in convolutions] == [(stride, stride) for stride in strides]
    assert {module.kernel_size for module in convolutions} == {(kernel_size, kernel_size)}
    assert (
        next(module for module in modules if isinstance(module, layer.Linear)).in_features
        == features
    )
    assert SpikingClassifier(net, T=4)(torch.rand(2, 3, 9, 12)).shape == (2, 7)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: small(shape=(1, 3, 8)), "cannot be halved 2 times"),
        (
            lambda: VGG("vgg16", (3, 16, 16), 10, T=2, spiking_neuron=DLIFNode),
            "cannot be halved 5 times",
        ),
        (
            lambda: VGG("vgg12", (3, 32, 32), 10, T=2, spiking_neuron=DLIFNode),
            "name must be one of vgg5, vgg11",
        ),
        (
            lambda: ConvChain((1, 8, 8), 10, T=4, spiking_neuron=DLIFNode, features=["A", 4]),
            "begin with a convolution",
        ),
        (
            lambda: ConvChain((1, 8, 8), 10, T=4, spiking_neuron=DLIFNode, features=[4, "S"]),
            "not end in a stride",
        ),
        (
            lambda: build_network(NetworkSpec(options={"strides": [2]})),
            r"strides must be 1 or 2 for each of 2 conv",
        ),
        (
            lambda: build_network(NetworkSpec(options={"strides": [3, 1]})),
            r"strides must be 1 or 2",
        ),
        (lambda: small()(torch.rand(3, 9, 12)), r"\[N, C, H, W\]"),
        (lambda: small(step_mode="s")(torch.rand(4, 2, 3, 9, 12)), "one frame"),
    ],
)
def test_wrong_use(use, message):
    with pytest.raises(ValueError, match=message):
        use()
