import pytest
import torch

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.classifier import PoissonEncoder
from sj_robust.models import NetworkSpec, SmallConvNet, build_network


def small(spiking_neuron=DLIFNode, step_mode="m", shape=(3, 9, 12), **kwargs):
    torch.manual_seed(0)
    net = SmallConvNet(shape, 7, T=4, spiking_neuron=spiking_neuron, channels=(4, 6), step_mode=step_mode, **kwargs)
    return net.eval()


@pytest.mark.parametrize("size", [8, 28, 32])
def test_sizes(size):
    net = small(shape=(1, size, size))
    assert SpikingClassifier(net, 4)(torch.rand(2, 1, size, size)).shape == (2, 7)


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


def test_widths_are_positive():
    with pytest.raises(ValueError, match=r"every convolution must have a width >= 1, got \[4, 0\]; leave"):
        build_network(NetworkSpec(channels=(4, 0)))
    with pytest.raises(ValueError, match=r"every hidden layer must have a width >= 1, got \[-8\]; leave"):
        build_network(NetworkSpec("vgg5", hidden=(-8,)))
