"""The monitor on networks of SpikingJelly's model zoo."""

import pytest
import torch
from perturbation.by_hand import assert_stats, capture, statistics_by_hand
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_vgg
from torch import nn

from sj_robust.neuron import DLIFNode
from sj_robust.perturbation import MPPDMonitor

pytestmark = pytest.mark.slow

T = 2


def build(arch, kind):
    torch.manual_seed(0)
    options = {
        "LIF": {"spiking_neuron": neuron.LIFNode, "decay_input": False, "surrogate_function": surrogate.ATan()},
        "DLIF": {"spiking_neuron": DLIFNode, "T": T},
    }[kind] | {"tau": 4.0}
    if arch == "vgg":
        net = spiking_vgg.spiking_vgg11_bn(num_classes=10, init_weights=False, **options)
        for index in (0, 3):  # 120 million weights whose gradients would only take time
            net.classifier[index].weight.requires_grad_(False)
    else:
        net = sew_resnet.sew_resnet18(num_classes=10, cnf="ADD", **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that deep layers fire
            nn.init.constant_(module.weight, 2.0)
            nn.init.constant_(module.bias, 0.5)
    functional.set_step_mode(net, "m")
    return net


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kind", "layers"), [("vgg", "LIF", 10), ("sew", "DLIF", 20)])
def test_model_zoo(arch, kind, layers):
    net = build(arch, kind).train()
    x = torch.rand(T, 2, 3, 32, 32)
    x_perturbed = x + 0.2 * torch.randn(x.shape)

    def train_step(a):
        functional.reset_net(net)
        net.zero_grad()
        out = net(a)
        out.mean(0).square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout) or "Dropout" in type(module).__name__:
            module.eval()
    plain = train_step(x_perturbed)
    monitor = MPPDMonitor(net)
    functional.reset_net(net)
    with torch.no_grad(), monitor.clean():
        net(x)
    functional.reset_net(net)
    with monitor.perturbed():
        watched = train_step(x_perturbed)
    assert len(plain) == len(watched) > layers
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert monitor.loss(layers="all", retain=False).requires_grad
    assert len(monitor.monitored_layers) == layers
    assert monitor.unsupported == {}

    stats = monitor.compare(x, x_perturbed)
    assert set(stats) == set(monitor.execution_order)
    net.eval()
    clean, perturbed = (capture(net, list(stats), lambda a=a: net(a)) for a in (x, x_perturbed))
    moved = 0
    for name, layer_stats in stats.items():
        expected = statistics_by_hand(*clean[name], *perturbed[name], 0.75, [1.0] * T)
        assert_stats(layer_stats, expected, rtol=1e-3, atol=1e-5)
        moved += layer_stats.summary()["spike_distance"] > 0
    assert moved >= layers - 3

    monitor.close()
    functional.reset_net(net)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
