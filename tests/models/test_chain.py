from dataclasses import dataclass

import pytest
import torch
from spikingjelly.activation_based import layer, neuron

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.models import VGG, ConvChain, FullyConnected, NetworkSpec, build_network
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


@pytest.mark.parametrize(
    ("features", "message"),
    [(["A", 4], "begin with a convolution"), ([4, "S"], "not end in a stride")],
)
def test_wrong_features(features, message):
    with pytest.raises(ValueError, match=message):
        ConvChain((1, 8, 8), 10, T=4, spiking_neuron=DLIFNode, features=features)


@pytest.mark.parametrize(
    ("kernel_size", "message"),
    [
        ([3], "one for each of 2 convolutions"),
        ([1, 3, 3], "one for each of 2 convolutions"),
        (0, "kernel_size must be >= 1, got 0"),
        ([1, 0], "kernel_size must be >= 1, got 0"),
        (3.0, "kernel_size must be an integer, got float"),
        ("33", "kernel_size must be an integer, got str"),
    ],
)
def test_wrong_kernel_sizes(kernel_size, message):
    spec = NetworkSpec(options={"kernel_size": kernel_size})
    with pytest.raises(ValueError, match=message):
        build_network(spec)


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


@pytest.mark.parametrize(
    ("thresholds", "changed", "message"),
    [
        ([0.5], {}, r"got 1 thresholds for kernels of \[2, 1, 1, 1\]"),
        ([0.2, 0.4], {"image_shape": (3, 8, 8)}, r"for kernels of \[2, 3, 1, 1\]"),
        ([0.2, 0.4], {"options": {"batch_norm": True}}, "for batch norm and kernels of"),
        ([0.2, 0.4], {"options": {"kernel_size": 3}}, r"for kernels of \[2, 1, 3, 3\]"),
        ([0.2, 0.4], {"neuron": "hosnn"}, "thresholds need IF, LIF, PLIF or DLIF neurons, got"),
        ([0.2, float("nan")], {}, r"must be finite numbers, got \[0.2, nan\]"),
    ],
)
def test_thresholds_that_do_not_fit(thresholds, changed, message):
    options = {"kernel_size": [1, 3], "batch_norm": False, "thresholds": thresholds}
    changed = {"channels": (2, 4)} | changed
    options |= changed.pop("options", {})
    with pytest.raises(ValueError, match=message):
        build_network(NetworkSpec(options=options, **changed))


@pytest.mark.parametrize("strides", [[2], [3, 1]])
def test_wrong_strides(strides):
    spec = NetworkSpec(options={"strides": strides})
    with pytest.raises(ValueError, match="strides must be 1 or 2 for each of 2 conv"):
        build_network(spec)


def test_wrong_shapes_of_images():
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        small()(torch.rand(3, 9, 12))
    with pytest.raises(ValueError, match="one frame"):
        small(step_mode="s")(torch.rand(4, 2, 3, 9, 12))


@pytest.mark.parametrize("widths", [(), (4, 0)])
def test_widths_that_are_none(widths):
    with pytest.raises(ValueError, match="widths must be one number >= 1 for each layer"):
        FullyConnected((1, 4, 4), 3, T=2, spiking_neuron=DLIFNode, widths=widths)


def test_the_first_linear_layer_sees_all_pixels():
    spec = NetworkSpec("mlp", image_shape=(2, 5, 7), classes=3, T=2, channels=(6, 4))
    net = build_network(spec)
    frames = torch.rand(2, 3, 2, 5, 7)
    currents = net.first(frames)
    expected = frames.flatten(2) @ net.first.weight.flatten(1).T + net.first.bias
    torch.testing.assert_close(currents.flatten(2), expected)
    assert net(frames).shape == (2, 3, 3)
