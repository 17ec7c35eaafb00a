"""Networks that run in stages or plain, and what a pass gives."""

import copy

import torch
from spikingjelly.activation_based import functional, layer, surrogate
from torch import nn
from torch.testing import assert_close

from sj_robust.neuron import DLIFNode, Stage, fuse
from sj_robust.neuron.fusion import plain_names

T = 4


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 6, 3, padding=1),
        layer.BatchNorm2d(6),
        DLIFNode(T=T, v_reset=None),
        nn.Sequential(
            layer.Conv2d(6, 5, 2),
            layer.BatchNorm2d(5),
            DLIFNode(T=T, surrogate_function=surrogate.ATan()),
            layer.AvgPool2d(2),
        ),
        layer.Flatten(),
        layer.Linear(45, 8),
        DLIFNode(T=T),
    )
    functional.set_step_mode(net, "m")
    for node in neurons_of(net):
        nn.init.uniform_(node.input_gain, 0.5, 1.5)
    return net


class Noisy(DLIFNode):
    """A neuron of somebody's own."""

    def forward(self, x_seq):
        return 0.5 * super().forward(x_seq)


def both():
    """The same network plain and fused."""
    plain = network()
    fused = copy.deepcopy(plain)
    assert fuse(fused).stages == {"1": ("1", "2"), "3.1": ("3.1", "3.2", "3.3")}
    return plain, fused


def first_parts(net):
    """Batch norm and neuron of the first stage."""
    if isinstance(net[1], Stage):
        return (net[1].norm, net[1].node)
    return (net[1], net[2])


def sequence(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def step(net, x, train=True):
    """Outputs, gradients and state of a pass over one batch."""
    functional.reset_net(net)
    net.train(train).zero_grad()
    x = x.to(net[0].weight.dtype, copy=True).requires_grad_()
    out = net(x)
    weighted_sum(out).backward()
    names = plain_names(net)
    found = {"out": out.detach(), "x": x.grad}
    for name, parameter in net.named_parameters():
        found[names[name]] = parameter.grad
    for name, buffer in net.named_buffers():
        found[f"state {names[name]}"] = buffer.clone()
    for index, node in enumerate(neurons_of(net)):
        found[f"potential {index}"] = node.v.detach()
        if node.store_v_seq:
            found[f"potentials {index}"] = node.v_seq.detach()
    return found


def neurons_of(net):
    """The spiking layers."""
    return [module for module in net.modules() if isinstance(module, DLIFNode)]


def weighted_sum(out):
    """A loss that depends on every output in its own way."""
    return (out * torch.linspace(-1, 1, out.shape[-1])).sum()


def assert_same(actual, wanted):
    assert actual.keys() == wanted.keys()
    assert torch.equal(actual["out"], wanted["out"])
    exact = wanted["out"].dtype == torch.float64
    limits = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for name, tensor in wanted.items():
        assert_close(actual[name], tensor, **limits, msg=lambda m, name=name: f"{name}: {m}")


def three(build):
    """Batch norm, neuron and pooling of the same weights, in a stage or in ``nn.Sequential``."""
    torch.manual_seed(0)
    norm = layer.BatchNorm2d(3)
    node = DLIFNode(T=2)
    pool = layer.AvgPool2d(2)
    nn.init.uniform_(node.input_gain, 0.5, 1.5)
    net = Stage(node, norm=norm, pool=pool) if build is Stage else nn.Sequential(norm, node, pool)
    functional.set_step_mode(net, "m")
    return net, {"norm": norm, "node": node, "pool": pool}


def forward_and_backward(net):
    """Output and gradients."""
    functional.reset_net(net)
    x = sequence(2, 2, 3, 4, 4).requires_grad_()
    out = net(x)
    weighted_sum(out).backward()
    found = [out.detach(), x.grad, *[p.grad for p in net.parameters()]]
    net.zero_grad()
    return found


def layers_of(net):
    """Names of the three spiking layers."""
    return [name for name, module in net.named_modules() if isinstance(module, DLIFNode)]
