"""Spiking networks whose bounds are tested, and inputs around their images."""

from functools import partial

import torch
from proofs import fuzz
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import pgd

T = 4


def with_gains(**options):
    """DLIF with gains of either sign."""
    node = DLIFNode(T=T, **options)
    node.input_gain.data = torch.tensor([1.5, -0.7, 2.0, 0.3])
    return node


def starting_at(potential, node):
    """A neuron that a reset brings to a potential other than v_reset."""
    node.set_reset_value("v", potential)
    node.reset()
    return node


NEURONS = {
    "IF": neuron.IFNode,
    "LIF": neuron.LIFNode,
    "LIF soft": partial(neuron.LIFNode, tau=3.0, decay_input=False, v_reset=None),
    "LIF reset to 0.2": partial(neuron.LIFNode, v_reset=0.2, v_threshold=0.7),
    "LIF reset to -0.5": partial(neuron.LIFNode, v_reset=-0.5, v_threshold=0.3),
    "PLIF": neuron.ParametricLIFNode,
    "DLIF": partial(with_gains, tau=4.0),
    "DLIF soft": partial(with_gains, tau=10.0, v_reset=None, v_threshold=0.6),
    "DLIF from 0.5": lambda: starting_at(0.5, with_gains(tau=4.0)),
}


def convolutional(node):
    return nn.Sequential(
        layer.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        layer.BatchNorm2d(4),
        node(),
        layer.AvgPool2d(2),
        layer.Flatten(),
        layer.Linear(16, 6, bias=False),
        node(),
        layer.Linear(6, 3),
    )


def residual(node):
    def block():
        convolution = layer.Conv2d(4, 4, 3, padding=1)
        return fuzz.Residual(convolution, layer.BatchNorm2d(4), node())

    return nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        node(),
        block(),
        layer.MaxPool2d(2),
        block(),
        layer.AdaptiveAvgPool2d(2),
        layer.Flatten(),
        layer.Linear(16, 3),
    )


def spikes_at_the_end(node):
    return nn.Sequential(
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(32, 3),
        node(),
    )


NETWORKS = [convolutional, residual, spikes_at_the_end]
SAMPLED = [
    (convolutional, "IF", "m"),
    (residual, "LIF", "s"),
    (spikes_at_the_end, "LIF soft", "m"),
    (convolutional, "LIF reset to 0.2", "s"),
    (residual, "LIF reset to -0.5", "m"),
    (convolutional, "PLIF", "m"),
    (residual, "DLIF", "m"),
    (spikes_at_the_end, "DLIF soft", "s"),
    (convolutional, "DLIF from 0.5", "s"),
]
"""Every neuron, in some network and step mode."""
QUICK = [SAMPLED[0], SAMPLED[2], SAMPLED[7]]
"""Those that take least: no residual network, but soft resets and gains of either sign."""


def classifier(build, node, *, seed=0, step_mode="m", **options):
    """A network in evaluation mode whose neurons fire and whose batch norms have seen data."""
    torch.manual_seed(seed)
    net = build(node)
    fuzz.fill_batch_norms(net, least_variance=0.5)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= 3  # so that neurons fire
    functional.set_step_mode(net, step_mode)
    return SpikingClassifier(net, T, **options).eval()


def in_steps(*parts, T=T, kind=SpikingClassifier):
    """Layers one after the other in step mode m, in evaluation mode."""
    net = nn.Sequential(*parts)
    functional.set_step_mode(net, "m")
    return kind(net, T).eval()


def small(node, *, seed=0):
    """Two layers of neurons on three pixels, each of which fires at some inputs."""
    torch.manual_seed(seed)
    parts = (layer.Linear(3, 5), node(), layer.Linear(5, 4), node(), layer.Linear(4, 3))
    for part in parts[::2]:
        nn.init.normal_(part.weight, 0.5, 2.0)
    return in_steps(*parts)


def batch(model, count):
    """Images for :data:`NETWORKS` and the classes that a model gives them."""
    x = torch.rand(count, 2, 8, 8)
    return x, model(x).argmax(1)


def perturbed(model, x, y, eps):
    """Points of the ball: its corners, random ones, and adversarial ones."""
    at_random = [2 * torch.rand(x.shape) - 1 for _ in range(4)]
    corners = [2.0 * torch.randint(2, x.shape) - 1 for _ in range(4)]
    yield x.clamp(0, 1)
    for direction in (*at_random, *corners):
        z = x + eps * direction
        inside = torch.maximum(torch.minimum(z, x + eps), x - eps)
        yield inside.clamp(0, 1)
    if eps > 0:
        yield pgd(model, x, y, eps=eps, step_size=eps / 3, steps=5)


def assert_keep_their_class(model, x, y, eps, verified):
    """No perturbed image of those that are verified gets another class."""
    verified = torch.tensor(verified)
    for z in perturbed(model, x, y, eps):
        right = model(z).argmax(1) == y
        assert right[verified].all()
