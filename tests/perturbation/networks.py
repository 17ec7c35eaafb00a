"""Small networks for the monitor's tests."""

from contextlib import nullcontext
from functools import partial

import torch
from perturbation.by_hand import Dynamics
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from sj_robust.neuron import DLIFNode

T = 4
NAMES = ("2", "4", "8")
"""The neurons of :func:`conv_net`."""


def dlif():
    node = DLIFNode(T=T, tau=2.0)
    node.input_gain.data = torch.tensor((1.5, 0.5, 1.0, 2.0))
    return node


LIF = partial(neuron.LIFNode, tau=4.0, decay_input=False)
SMALL_INPUT_LIF = partial(neuron.LIFNode, tau=4.0, decay_input=True, v_threshold=0.25)
PLIF = partial(neuron.ParametricLIFNode, init_tau=5.0, decay_input=True, v_threshold=0.25)
NEURONS = {
    "IF": (neuron.IFNode, Dynamics(1.0)),
    "IF soft": (partial(neuron.IFNode, v_reset=None), Dynamics(1.0, v_reset=None)),
    "LIF": (LIF, Dynamics(0.75)),
    "LIF decay_input": (SMALL_INPUT_LIF, Dynamics(0.75, 0.25, v_threshold=0.25)),
    "LIF soft": (partial(LIF, v_reset=None), Dynamics(0.75, v_reset=None)),
    "LIF reset -0.2": (partial(LIF, v_reset=-0.2), Dynamics(0.75, v_reset=-0.2)),
    "PLIF": (PLIF, Dynamics(0.8, 0.2, v_threshold=0.25)),
    "DLIF": (dlif, Dynamics(0.5, (1.5, 0.5, 1.0, 2.0))),
}
"""How a neuron is built, and its decay, gain and reset written out by hand."""


def conv_net(kind):
    """Two convolutions and a linear layer, each followed by a neuron, and a readout, in training
    mode but for the batch norm; step mode "m".
    """
    make = NEURONS[kind][0] if isinstance(kind, str) else kind
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        layer.BatchNorm2d(4).eval(),
        make(),
        layer.Conv2d(4, 4, 3, padding=1),
        make(),
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(36, 8),
        make(),
        layer.Linear(8, 3),
    )
    for module in net:
        if isinstance(module, layer.Linear | layer.Conv2d):
            module.weight.data.mul_(5.0)  # so that every layer fires
    functional.set_step_mode(net, "m")
    return net


class Recurrent(nn.Module):
    """A recurrent block that calls its neuron once per step inside a multi-step network."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.feedback = nn.Linear(6, 6)
        self.sn = neuron.LIFNode(
            tau=2.0, decay_input=False, surrogate_function=surrogate.ATan(), step_mode="s"
        )

    def forward(self, x_seq):
        y = torch.zeros_like(x_seq[0])
        outputs = []
        for x in x_seq:
            y = self.sn(self.inner(x) + self.feedback(y))
            outputs.append(y)
        return torch.stack(outputs)


def recurrent_net():
    """Input layer, hand-made recurrent block, SpikingJelly's recurrent container, last layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        layer.Linear(5, 6, step_mode="m"),
        neuron.LIFNode(tau=2.0, step_mode="m", v_threshold=0.5),
        Recurrent(),
        layer.LinearRecurrentContainer(neuron.IFNode(v_threshold=0.5), 6, 6, step_mode="m"),
        layer.Linear(6, 4, step_mode="m"),
        neuron.IFNode(step_mode="m", v_threshold=0.5),
    ).eval()


class Shared(nn.Module):
    """Calls one neuron twice per step, under two names, once by keyword."""

    def __init__(self, first, second):
        super().__init__()
        self.first = first
        self.second = second
        self.sn = neuron.LIFNode(tau=2.0, decay_input=False)
        self.same = self.sn

    def forward(self, x):
        spikes = self.sn(self.first(x))
        return self.same(x=self.second(spikes))


class Leaky(neuron.BaseNode):
    """A user's neuron that runs on either release: decay 0.6, gain 0.5, subtractive reset."""

    def __init__(self):
        super().__init__(v_reset=None)

    def single_step_forward(self, x):
        v = self.v if isinstance(self.v, torch.Tensor) else torch.full_like(x, self.v)
        h = 0.6 * v + 0.5 * x
        spike = self.surrogate_function(h - self.v_threshold)
        self.v = self.potential_after(h, spike)
        return spike

    def multi_step_forward(self, x_seq):
        return torch.stack([self.single_step_forward(x) for x in x_seq])

    def potential_after(self, h, spike):
        return h - spike * self.v_threshold


def linear_net(*neurons):
    """A linear layer of 6 features in front of each neuron; step mode "m"."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for node in neurons:
        linear = layer.Linear(6, 6)
        linear.weight.data.mul_(4)
        net.extend([linear, node])
    functional.set_step_mode(net, "m")
    return net


def inputs(*shape, scale=1.0, noise=1.0, seed=0):
    """Clean and perturbed input [T, *]."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.rand(T, *shape, generator=generator)
    return x, x + noise * torch.randn(x.shape, generator=generator)


def images(seed=1, n=3):
    """Clean and perturbed input [T, N, 2, 6, 6]."""
    return inputs(n, 2, 6, 6, noise=0.3, seed=seed)


def run_pair(monitor, net, x, x_perturbed, way="two runs", run=None):
    """A clean and a perturbed run from a reset, in one of the ways that a monitor takes."""
    if way == "single steps":
        functional.set_step_mode(net, "s")
        run = in_steps(net)
    elif way == "chunks":
        run = in_chunks(net)
    run = run or net
    context = torch.inference_mode() if way == "inference" else nullcontext()
    with context:
        functional.reset_net(net)
        with monitor.clean():
            run(x)
        functional.reset_net(net)
        with monitor.perturbed():
            run(x_perturbed)


def in_chunks(net):
    """Runs a multi-step network over a sequence in two calls."""
    return lambda x_seq: [net(chunk) for chunk in x_seq.split((1, 3))]


def in_steps(net):
    """Runs a single-step network over a sequence."""
    return lambda x_seq: [net(x) for x in x_seq]
