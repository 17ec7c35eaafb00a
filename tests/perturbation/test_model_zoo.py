"""The monitor on networks of SpikingJelly's model zoo."""

import pytest
import torch
from perturbation.by_hand import Dynamics, assert_stats, captured_pair, statistics_by_hand
from perturbation.networks import run_pair
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_vgg
from torch import nn

from sj_robust.neuron import DLIFNode
from sj_robust.perturbation import MPPDMonitor

pytestmark = pytest.mark.slow

T = 2


def vgg():
    return spiking_vgg.spiking_vgg11_bn(
        init_weights=False,
        num_classes=10,
        spiking_neuron=neuron.LIFNode,
        decay_input=False,
        surrogate_function=surrogate.ATan(),
        tau=4.0,
    )


def sew():
    return sew_resnet.sew_resnet18(
        cnf="ADD",
        num_classes=10,
        spiking_neuron=DLIFNode,
        T=T,
        tau=4.0,
    )


@pytest.mark.parametrize(("build", "layers"), [(vgg, 10), (sew, 20)])
def test_every_neuron_is_followed(build, layers):
    torch.manual_seed(0)
    net = build().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that deep layers fire
            nn.init.constant_(module.weight, 2.0)
            nn.init.constant_(module.bias, 0.5)
    functional.set_step_mode(net, "m")
    x = torch.rand(T, 2, 3, 32, 32)
    x_perturbed = x + 0.2 * torch.randn(x.shape)
    monitor = MPPDMonitor(net)
    stats = monitor.compare(x, x_perturbed)
    assert monitor.unsupported == {}
    assert set(stats) == set(monitor.execution_order) == set(monitor.monitored_layers)
    assert len(stats) == layers
    moved = 0
    dynamics = Dynamics(decay=0.75, gain=[1.0] * T)
    for name, seen in captured_pair(net, list(stats), x, x_perturbed).items():
        expected = statistics_by_hand(seen, dynamics)
        assert_stats(stats[name], expected, rtol=1e-3, atol=1e-5)
        if stats[name].summary()["spike_distance"] > 0:
            moved += 1
    assert moved >= layers - 3
    run_pair(monitor, net.train(), x, x_perturbed)
    assert monitor.loss(layers="all", retain=False).requires_grad
