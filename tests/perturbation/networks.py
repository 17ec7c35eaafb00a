"""Small networks for the monitor's tests."""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from perturbation.by_hand import Dynamics
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from sj_robust.neuron import DLIFNode

T = 4


def _dlif():
    node = DLIFNode(T=T, tau=2.0)
    node.input_gain.data = torch.tensor((1.5, 0.5, 1.0, 2.0))
    return node


@dataclass(frozen=True)
class Kind:
    """How a neuron is built, and its decay, gain and reset written out by hand."""

    build: Callable[[], nn.Module]
    decay: float
    gain: float | tuple[float, ...] = 1.0
    v_reset: float | None = 0.0

    @property
    def gains(self):
        """The gain of every step."""
        if isinstance(self.gain, tuple):
            return list(self.gain)
        return [self.gain] * T

    def dynamics(self, **options):
        return Dynamics(
            decay=self.decay,
            gain=self.gains,
            v_reset=self.v_reset,
            **options,
        )


LIF = partial(neuron.LIFNode, tau=4.0, decay_input=False)
SMALL_INPUT_LIF = partial(neuron.LIFNode, tau=4.0, decay_input=True, v_threshold=0.25)
PLIF = partial(neuron.ParametricLIFNode, init_tau=5.0, decay_input=True, v_threshold=0.25)
NEURONS = {
    "IF": Kind(
        neuron.IFNode,
        decay=1.0,
    ),
    "IF soft": Kind(
        partial(neuron.IFNode, v_reset=None),
        decay=1.0,
        v_reset=None,
    ),
    "LIF": Kind(
        LIF,
        decay=0.75,
    ),
    "LIF decay_input": Kind(
        SMALL_INPUT_LIF,
        decay=0.75,
        gain=0.25,
    ),
    "LIF soft": Kind(
        partial(LIF, v_reset=None),
        decay=0.75,
        v_reset=None,
    ),
    "LIF reset -0.2": Kind(
        partial(LIF, v_reset=-0.2),
        decay=0.75,
        v_reset=-0.2,
    ),
    "PLIF": Kind(
        PLIF,
        decay=0.8,
        gain=0.2,
    ),
    "DLIF": Kind(
        _dlif,
        decay=0.5,
        gain=(1.5, 0.5, 1.0, 2.0),
    ),
}


def conv_net(make):
    """Two convolutions and a linear layer, each followed by a neuron, and a readout; step mode
    "m".
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        layer.BatchNorm2d(4),
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
    )


class Shared(nn.Module):
    """Calls one neuron twice per step, under two names."""

    def __init__(self, first, second):
        super().__init__()
        self.first = first
        self.second = second
        self.sn = neuron.LIFNode(tau=2.0, decay_input=False)
        self.same = self.sn

    def forward(self, x):
        spikes = self.sn(self.first(x))
        return self.same(self.second(spikes))


def images(seed=1, n=3):
    """Clean and perturbed input [T, N, 2, 6, 6]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(T, n, 2, 6, 6, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    return x, x + 0.3 * noise


def trainable(kind):
    """In training mode, where neurons of both releases have a gradient, but with fixed batch
    norm.
    """
    net = conv_net(NEURONS[kind].build).train()
    net[1].eval()
    return net


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
        if way == "paired":
            with monitor.paired():
                run(torch.cat((x, x_perturbed), 1))
            return
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


def storage_bytes(monitor):
    """How many bytes the tensors take that are held by the monitor's own objects."""
    stack = [vars(monitor)]
    seen = set()
    storages = {}
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | deque):
            stack.extend(item)
        elif type(item).__module__.startswith("sj_robust.perturbation"):
            stack.append(vars(item))
    return sum(storages.values())
