from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch.testing import assert_close

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.classifier import PoissonEncoder
from sj_robust.models import VGG, FullyConnected, WideResNet
from sj_robust.models.chain import SmallConvNet

NEURONS = [
    DLIFNode,
    partial(neuron.LIFNode, tau=2.0),
    neuron.IFNode,
    partial(neuron.ParametricLIFNode, init_tau=2.0),
]
NETWORKS = {
    "small": partial(SmallConvNet, channels=(4, 6)),
    "mlp": partial(FullyConnected, widths=(12, 9)),
    "vgg": partial(VGG, "vgg5", hidden=(30, 20)),
    "wide": partial(WideResNet, depth=10, widen_factor=1),
}


def build(name, spiking_neuron=DLIFNode, step_mode="m", shape=(3, 9, 12)):
    torch.manual_seed(0)
    net = NETWORKS[name](
        shape,
        classes=7,
        T=4,
        spiking_neuron=spiking_neuron,
        step_mode=step_mode,
        v_threshold=0.2,
    )
    return net.eval()


@pytest.mark.parametrize("spiking_neuron", NEURONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_and_its_copies_over_time_and_single_steps_give_the_same_outputs(
    name, spiking_neuron
):
    net = build(name, spiking_neuron)
    single = build(name, spiking_neuron, step_mode="s")
    images = torch.rand(5, 3, 9, 12) * 3
    with torch.no_grad():
        outputs = net(images)
        functional.reset_net(net)
        repeated = net(images.expand(4, *images.shape))
        steps = torch.stack([single(images) for _ in range(4)])
    assert outputs.shape == (4, 5, 7)
    assert outputs.std() > 0
    assert_close(outputs, repeated)
    assert_close(outputs, steps)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("small", "stages.0.norm"),
        ("vgg", "stages.0.norm"),
        ("wide", "stages.0.activation.norm"),
    ],
)
def test_the_first_convolution_runs_once_and_batch_norm_sees_every_copy(name, norm):
    net = build(name).train()
    steps = []

    def note(module, inputs, output):
        steps.append(inputs[0].shape[0])

    net.first.register_forward_hook(note)
    net.get_submodule(norm).register_forward_hook(note)
    net(torch.rand(5, 3, 9, 12))
    assert steps == [1, 4]


@pytest.mark.parametrize("size", [5, 28, 64])
@pytest.mark.parametrize("name", ["small", "wide"])
def test_sizes_and_encoders(name, size):
    net = build(name, shape=(1, size, size))
    images = torch.rand(2, 1, size, size)
    for encoder in (None, PoissonEncoder(torch.Generator().manual_seed(0))):
        model = SpikingClassifier(net, 4, encoder)
        with torch.no_grad():
            assert model(images).shape == (2, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gradient_reaches_every_parameter(name):
    """What a wide residual network computes is compared in test_published_checkpoint."""
    net = build(name).double()
    for key, value in net.state_dict().items():
        if value.ndim == 1 and key.endswith(("weight", "bias", "running_mean")):
            value.add_(torch.rand_like(value))
    net(3 * torch.rand(2, 3, 9, 12).double()).square().sum().backward()
    for key, value in net.named_parameters():
        reached = value.grad.all() if key.endswith("mixing") else value.grad.any()
        assert reached, key
