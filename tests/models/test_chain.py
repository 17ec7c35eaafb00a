from dataclasses import dataclass

import pytest
import torch
from spikingjelly.activation_based import layer, neuron

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.models import VGG, NetworkSpec, build_network
from sj_robust.models.chain import VGG_FEATURES, SmallConvNet

CONVOLUTIONS = {
    "vgg5": 3,
    "vgg11": 8,
    "vgg13": 10,
    "vgg16": 13,
    "vgg19": 16,
}


def small(spiking_neuron=DLIFNode, step_mode="m", shape=(3, 9, 12)):
    torch.manual_seed(0)
    net = SmallConvNet(
        shape,
        classes=7,
        T=4,
        spiking_neuron=spiking_neuron,
        channels=(4, 6),
        step_mode=step_mode,
    )
    return net.eval()


def build_vgg(name, size=32, T=2):
    return VGG(
        name,
        (3, size, size),
        classes=10,
        T=T,
        spiking_neuron=DLIFNode,
    )


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
    assert len(convolutions) == CONVOLUTIONS[name]
    assert len(of_kind(net, layer.BatchNorm2d)) == CONVOLUTIONS[name]
    assert len(of_kind(net, DLIFNode)) == CONVOLUTIONS[name] + 2
    first, _, last = of_kind(net, layer.Linear)
    assert last.out_features == 10
    size = 32 // 2 ** VGG_FEATURES[name].count("A")
    assert first.in_features == convolutions[-1].out_channels * size**2


def test_vgg11_has_the_sizes_of_the_paper():
    with torch.device("meta"):
        net = build_vgg("vgg11", T=8)
    count = 0
    inputs = 3
    for outputs in (64, 128, 256, 512, 512, 512, 512, 512):
        count += 9 * inputs * outputs + outputs  # a convolution
        count += 2 * outputs  # its batch norm
        inputs = outputs
    inputs = 512 * 4 * 4
    for outputs in (4096, 4096, 10):
        count += inputs * outputs + outputs
        inputs = outputs
    count += 8 * len(of_kind(net, DLIFNode))
    sizes = [parameter.numel() for parameter in net.parameters()]
    assert sum(sizes) == count
    first, second, last = of_kind(net, layer.Linear)
    assert first.weight.shape == (4096, 512 * 4 * 4)
    assert second.weight.shape == (4096, 4096)
    assert last.weight.shape == (10, 4096)


@dataclass(frozen=True)
class Strided:
    """Options of a chain without poolings, and the features that are left of an image."""

    strides: list[int]
    kernel_size: int | list[int]
    features: int

    @property
    def kernels(self):
        """The kernel size of each convolution."""
        size = self.kernel_size
        return [size] * len(self.strides) if isinstance(size, int) else size


@pytest.mark.parametrize(
    "case",
    [
        Strided(strides=[1, 2], kernel_size=3, features=6 * 5 * 6),
        Strided(strides=[2, 2], kernel_size=4, features=6 * 2 * 3),
        Strided(strides=[1, 2], kernel_size=[1, 4], features=6 * 4 * 6),
    ],
)
def test_strides_in_the_place_of_poolings_and_no_batch_norm(case):
    options = {"strides": case.strides, "kernel_size": case.kernel_size, "batch_norm": False}
    spec = NetworkSpec(
        image_shape=(3, 9, 12),
        classes=7,
        channels=(4, 6),
        options=options,
    )
    net = build_network(spec)
    assert of_kind(net, layer.BatchNorm2d | layer.AvgPool2d) == []
    convolutions = of_kind(net, layer.Conv2d)
    shapes = zip(convolutions, case.strides, case.kernels, strict=True)
    for convolution, stride, kernel in shapes:
        assert convolution.stride == (stride, stride)
        assert convolution.kernel_size == (kernel, kernel)
    (linear,) = of_kind(net, layer.Linear)
    assert linear.in_features == case.features
    logits = SpikingClassifier(net, T=4)(torch.rand(2, 3, 9, 12))
    assert logits.shape == (2, 7)


def test_images_that_cannot_be_halved():
    with pytest.raises(ValueError, match="cannot be halved 2 times"):
        small(shape=(1, 3, 8))
    with pytest.raises(ValueError, match="cannot be halved 5 times"):
        build_vgg("vgg16", size=16)


def test_an_unknown_vgg():
    with pytest.raises(ValueError, match="name must be one of vgg5, vgg11"):
        build_vgg("vgg12")


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


def test_wrong_shapes_of_images():
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        small()(torch.rand(3, 9, 12))
    with pytest.raises(ValueError, match="one frame"):
        small(step_mode="s")(torch.rand(4, 2, 3, 9, 12))


def test_the_first_linear_layer_sees_all_pixels():
    spec = NetworkSpec("mlp", image_shape=(2, 5, 7), classes=3, T=2, channels=(6, 4))
    net = build_network(spec)
    frames = torch.rand(2, 3, 2, 5, 7)
    currents = net.first(frames)
    expected = frames.flatten(2) @ net.first.weight.flatten(1).T + net.first.bias
    torch.testing.assert_close(currents.flatten(2), expected)
    assert net(frames).shape == (2, 3, 3)
