import pytest
import torch
from spikingjelly.activation_based import layer, neuron

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.models import NetworkSpec, WideResNet, build_network
from sj_robust.models.chain import VGG_FEATURES, SmallConvNet
from sj_robust.models.wide_resnet import WIDE_RESNETS, MixedBlock

CONVOLUTIONS = {
    "vgg5": 3,
    "vgg11": 8,
    "vgg13": 10,
    "vgg16": 13,
    "vgg19": 16,
}


def of_kind(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", VGG_FEATURES)
def test_layers_of_vgg_as_in_the_paper(name):
    spec = NetworkSpec(
        name,
        image_shape=(3, 32, 32),
        classes=10,
        T=2,
        hidden=(24, 20),
    )
    with torch.device("meta"):
        net = build_network(spec)
    convolutions = of_kind(net, layer.Conv2d)
    widths = [size for size in VGG_FEATURES[name] if size != "A"]
    assert [found.out_channels for found in convolutions] == widths
    assert len(convolutions) == CONVOLUTIONS[name]
    assert len(of_kind(net, layer.BatchNorm2d)) == CONVOLUTIONS[name]
    assert len(of_kind(net, DLIFNode)) == CONVOLUTIONS[name] + 2
    first, _, last = of_kind(net, layer.Linear)
    assert last.out_features == 10
    size = 32 // 2 ** VGG_FEATURES[name].count("A")
    assert first.in_features == convolutions[-1].out_channels * size**2


@pytest.mark.parametrize(
    ("strides", "kernel_size", "features"),
    [
        ([1, 2], 3, 6 * 5 * 6),
        ([2, 2], 4, 6 * 2 * 3),
        ([1, 2], [1, 4], 6 * 4 * 6),
    ],
)
def test_strides_in_the_place_of_poolings_and_no_batch_norm(strides, kernel_size, features):
    options = {"strides": strides, "kernel_size": kernel_size, "batch_norm": False}
    spec = NetworkSpec(image_shape=(3, 9, 12), classes=7, channels=(4, 6), options=options)
    net = build_network(spec)
    assert of_kind(net, layer.BatchNorm2d | layer.AvgPool2d) == []
    kernels = kernel_size if isinstance(kernel_size, list) else [kernel_size] * 2
    shapes = [(found.stride[0], found.kernel_size[0]) for found in of_kind(net, layer.Conv2d)]
    assert shapes == list(zip(strides, kernels, strict=True))
    (linear,) = of_kind(net, layer.Linear)
    assert linear.in_features == features
    assert SpikingClassifier(net, T=4)(torch.rand(2, 3, 9, 12)).shape == (2, 7)


@pytest.mark.parametrize("v_reset", [0.0, None, -0.5])
@pytest.mark.parametrize(
    ("node", "options"),
    [
        (neuron.IFNode, {}),
        (neuron.LIFNode, {"tau": 3.0}),
        (neuron.LIFNode, {"tau": 3.0, "decay_input": False}),
        (neuron.ParametricLIFNode, {"init_tau": 4.0}),
        (DLIFNode, {"v_threshold": 0.7}),
    ],
)
def test_the_first_neurons_start_to_fire_at_thresholds(node, options, v_reset):
    thresholds = [0.2, 0.45, 0.7]
    net = SmallConvNet(
        (1, 4, 5),
        10,
        T=2,
        spiking_neuron=node,
        channels=(3, 4),
        strides=(1, 2),
        kernel_size=(1, 3),
        batch_norm=False,
        thresholds=thresholds,
        v_reset=v_reset,
        **options,
    )
    x = torch.linspace(0.0, 1.0, 20).view(1, 1, 4, 5)
    spikes = net.stages[0](net.first(x.expand(2, 1, 1, 4, 5)))
    for channel, threshold in enumerate(thresholds):
        assert torch.equal(spikes[0, 0, channel], (x[0, 0] >= threshold).float())


def test_the_first_linear_layer_sees_all_pixels():
    spec = NetworkSpec("mlp", image_shape=(2, 5, 7), classes=3, T=2, channels=(6, 4))
    net = build_network(spec)
    frames = torch.rand(2, 3, 2, 5, 7)
    currents = net.first(frames)
    expected = frames.flatten(2) @ net.first.weight.flatten(1).T + net.first.bias
    torch.testing.assert_close(currents.flatten(2), expected)
    assert net(frames).shape == (2, 3, 3)


PUBLISHED = {"wrn16_4": 2_748_890, "wrn28_10": 36_479_194}
"""Parameters of the published networks, without mixing coefficients."""


@pytest.mark.parametrize("name", WIDE_RESNETS)
def test_number_of_parameters(name):
    depth, k = WIDE_RESNETS[name]
    options = {"spiking_neuron": DLIFNode, "depth": depth, "widen_factor": k}
    with torch.device("meta"):
        net = WideResNet((3, 32, 32), 10, T=8, **options)
    blocks = of_kind(net, MixedBlock)
    assert len(blocks) == (depth - 4) // 2
    neurons = 2 * len(blocks) + 1
    assert len(of_kind(net, DLIFNode)) == neurons
    count = sum(parameter.numel() for parameter in net.parameters())
    assert count == PUBLISHED[name] + 2 * len(blocks) + 8 * neurons
    shortcuts = [block.shortcut for block in blocks if block.shortcut is not None]
    assert [found.stride[0] for found in shortcuts] == [1, 2, 2]
