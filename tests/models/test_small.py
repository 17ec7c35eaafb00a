from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, neuron

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.classifier import PoissonEncoder
from sj_robust.models import NetworkSpec, SmallConvNet, build_network

NEURONS = [
    DLIFNode,
    partial(neuron.LIFNode, tau=2.0),
    neuron.IFNode,
    partial(neuron.ParametricLIFNode, init_tau=2.0),
]


def small(spiking_neuron=DLIFNode, step_mode="m", shape=(3, 9, 12), **kwargs):
    torch.manual_seed(0)
    net = SmallConvNet(shape, 7, T=4, spiking_neuron=spiking_neuron, channels=(4, 6), step_mode=step_mode, **kwargs)
    return net.eval()


@pytest.mark.parametrize("spiking_neuron", NEURONS)
def test_an_image_and_its_copies_over_time_and_single_steps_give_the_same_outputs(spiking_neuron):
    net, single = small(spiking_neuron), small(spiking_neuron, step_mode="s")
    images = torch.rand(5, 3, 9, 12) * 3
    with torch.no_grad():
        outputs = net(images)
        functional.reset_net(net)
        repeated = net(images.expand(4, *images.shape))
        steps = torch.stack([single(images) for _ in range(4)])
    assert outputs.shape == (4, 5, 7)
    assert outputs.std() > 0
    torch.testing.assert_close(outputs, repeated)
    torch.testing.assert_close(outputs, steps)


@pytest.mark.parametrize("size", [8, 28, 32])
def test_sizes(size):
    net = small(shape=(1, size, size))
    assert SpikingClassifier(net, 4)(torch.rand(2, 1, size, size)).shape == (2, 7)


def test_the_first_convolution_runs_once_and_batch_norm_sees_every_copy():
    net = small().train()
    seen = {}
    for name in ("first", "stages.0"):
        net.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: seen.update({name: x[0].shape[0]}))
    net(torch.rand(5, 3, 9, 12))
    assert seen == {"first": 1, "stages.0": 4}


def test_another_encoder_works():
    classifier = SpikingClassifier(small(), 4, PoissonEncoder(torch.Generator().manual_seed(0)))
    assert classifier(torch.rand(2, 3, 9, 12)).shape == (2, 7)


def test_neurons_share_nothing():
    nodes = [m for m in build_network(NetworkSpec()).modules() if isinstance(m, DLIFNode)]
    assert len(nodes) == 2
    assert nodes[0].T == 4
    assert nodes[0].surrogate_function is not nodes[1].surrogate_function


@pytest.mark.parametrize("kind", ["dlif", "lif", "if"])
def test_fresh_dlif_is_lif(kind):
    spec = NetworkSpec(neuron=kind, tau=float("inf") if kind == "if" else 5.0)
    images = torch.rand(6, *spec.image_shape)
    dlif = NetworkSpec(neuron="dlif", tau=spec.tau)
    outputs = []
    for choice in (spec, dlif):
        torch.manual_seed(1)
        outputs.append(build_network(choice)(images))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_wrong_use():
    with pytest.raises(ValueError, match="cannot be halved"):
        small(shape=(1, 3, 8))
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        small()(torch.rand(3, 9, 12))
    with pytest.raises(ValueError, match="one frame"):
        small(step_mode="s")(torch.rand(4, 2, 3, 9, 12))
    with pytest.raises(ValueError, match="neuron must be"):
        build_network(NetworkSpec(neuron="izhikevich"))
    with pytest.raises(ValueError, match="network must be"):
        build_network(NetworkSpec(name="huge"))
    with pytest.raises(ValueError, match=r"tau must be > 1, got 0.99"):
        build_network(NetworkSpec(tau=0.99))
