"""An existing network with DLIF neurons in place of its own: the same spikes before any
training.
"""

import math
from collections import OrderedDict, defaultdict, deque
from functools import partial
from types import MethodType
from typing import NamedTuple
from unittest.mock import MagicMock

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

from sj_robust.neuron import DLIFNode, dlif_to_lif, replace_neurons


def make():
    net = nn.Sequential(
        nn.Linear(4, 6),
        neuron.LIFNode(tau=3.0, v_threshold=0.5, v_reset=None, step_mode="m"),
        nn.Linear(6, 6),
        neuron.IFNode(v_threshold=0.7, step_mode="m", detach_reset=True),
        nn.Linear(6, 6),
        neuron.ParametricLIFNode(init_tau=2.0, decay_input=True, v_threshold=0.6, step_mode="m"),
        nn.Linear(6, 6),
        neuron.LIFNode(tau=2.0, decay_input=True, v_threshold=0.2, v_reset=-0.1, step_mode="m"),
    )
    net[3].set_reset_value("v", 0.3)
    net[3].reset()
    return net


def make_lively():
    """A network in which every layer spikes, and what it sees."""
    torch.manual_seed(0)
    net = make().double()
    for linear in net[::2]:
        nn.init.normal_(linear.weight, std=2.0)
    return net, torch.rand(5, 8, 4, dtype=torch.float64)


def test_same_spikes_and_gradients_before_any_training():
    net, x = make_lively()
    functional.reset_net(net)  # 2.x caches the list of stateful modules here
    wanted = net(x)
    wanted.mean().backward()
    gradient = net[0].weight.grad.clone()
    net.zero_grad()
    report = replace_neurons(net, T=5)
    assert report.replaced == {
        "1": "LIFNode",
        "3": "IFNode",
        "5": "ParametricLIFNode",
        "7": "LIFNode",
    }
    assert report.notes == {"5": "learnable tau frozen at 2"}
    assert wanted.sum() > 0
    functional.reset_net(net)
    assert torch.equal(net(x), wanted)
    assert net[1].input_gain.dtype == torch.float64
    functional.reset_net(net)
    assert [node.time_step for node in net[1::2]] == [0] * 4
    net(x).mean().backward()
    torch.testing.assert_close(net[0].weight.grad, gradient)


def test_mode_weights_and_surrogate_are_kept():
    net = make().eval()
    net[1].surrogate_function.alpha = 7.0
    weights = {
        name: p.clone()
        for name, p in net.named_parameters()
        if "w" not in name.split(".")[-1] or "weight" in name
    }
    surrogate_function = net[1].surrogate_function
    replace_neurons(net, T=3)
    for m in net.modules():
        assert not m.training
    assert net[1].surrogate_function.alpha == 7.0
    assert net[1].surrogate_function is surrogate_function
    assert net[3].detach_reset
    assert net[3].tau == math.inf
    for name, value in weights.items():
        assert torch.equal(net.get_parameter(name), value)


def test_what_cannot_be_converted_is_said_and_left_alone():
    net = nn.Sequential(neuron.KLIFNode(), neuron.LIFNode(), neuron.EIFNode())
    report = replace_neurons(net, T=2)
    assert list(report.skipped) == ["0", "2"]
    assert type(net[0]) is neuron.KLIFNode
    assert list(report.replaced) == ["1"]
    assert replace_neurons(net, T=2).replaced == {}


def test_shared_neurons_stay_shared():
    shared = neuron.LIFNode()
    net = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    report = replace_neurons(net, T=2)
    assert sorted(report.replaced) == ["a", "b.0"]
    assert net["a"] is net["b"][0]


def test_a_bare_neuron_is_refused():
    with pytest.raises(ValueError, match="nn.Sequential"):
        replace_neurons(neuron.LIFNode(), T=2)


def test_hooks_and_plain_lists_have_the_new_neurons():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = neuron.LIFNode(step_mode="m")
            self.second = neuron.IFNode(step_mode="m")
            self.listed = [self.first, {"deep": (self.second,)}]

        def forward(self, x):
            return self.listed[1]["deep"][0](self.listed[0](x))

    net = Net()
    seen = []
    handle = net.first.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    net.second.register_full_backward_hook(lambda module, *gradients: seen.append(type(module)))
    replace_neurons(net, T=2)
    net(torch.rand(2, 1, 4).requires_grad_()).sum().backward()
    assert seen == [DLIFNode, DLIFNode]
    assert net.listed[1]["deep"][0] is net.second
    handle.remove()
    functional.reset_net(net)
    net(torch.rand(2, 1, 4))
    assert len(seen) == 2


class Pair(NamedTuple):
    """A neuron and something else."""

    node: nn.Module
    other: int


class Kept(nn.Module):
    """A network that calls its neuron by way of a container."""

    def __init__(self, kept, call):
        super().__init__()
        self.node = neuron.LIFNode(step_mode="m")
        self.kept = kept(self.node)
        self.call = call

    def forward(self, x):
        return self.call(self.kept)(x)


class Row(tuple):
    """A tuple of a class of its own."""

    __slots__ = ()


def twice(node, x):
    return node(x.clone())


def cyclic(node):
    kept = {"node": node}
    kept["self"] = kept
    return kept


WAYS = {
    "namedtuple": (lambda node: Pair(node, 1), lambda kept: kept.node),
    "OrderedDict": (lambda node: OrderedDict(node=node), lambda kept: kept["node"]),
    "defaultdict": (lambda node: defaultdict(list, node=node), lambda kept: kept["node"]),
    "deque": (lambda node: deque([node]), lambda kept: kept[0]),
    "partial": (partial, lambda kept: kept),
    "method": (lambda node: node.forward, lambda kept: kept),
    "function": (lambda node: MethodType(twice, node), lambda kept: kept),
    "tuple": (lambda node: Row([node, 1]), lambda kept: kept[0]),
    "cyclic": (cyclic, lambda kept: kept["self"]["node"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_containers_have_the_new_neurons(way):
    net = Kept(*WAYS[way])
    kind = type(net.kept)
    assert replace_neurons(net, T=3).replaced == {"node": "LIFNode"}
    net(torch.rand(3, 1, 4))
    assert net.node.time_step == 3
    assert type(net.kept) is kind


class LearnedWidth(nn.Module):
    """A surrogate with a parameter."""

    def __init__(self):
        super().__init__()
        self.width = nn.Parameter(torch.tensor(2.0))

    def forward(self, z):
        smooth = torch.sigmoid(self.width * z)
        return (z >= 0).to(z) + smooth - smooth.detach()


def test_a_surrogate_that_neurons_share_stays_shared_and_learns():
    shared = LearnedWidth()
    node = partial(neuron.IFNode, surrogate_function=shared, step_mode="m")
    net = nn.Sequential(nn.Linear(4, 6), node(), nn.Linear(6, 6), node())
    replace_neurons(net, T=2)
    net(torch.rand(2, 3, 4)).sum().backward()
    assert shared.width.grad.abs() > 0
    assert net[1].surrogate_function is net[3].surrogate_function is shared


@pytest.mark.parametrize(
    ("threshold", "notes", "skipped"),
    [
        (nn.Parameter(torch.tensor(0.8)), {"0": "learnable v_threshold frozen at 0.8"}, []),
        (torch.tensor([0.8, 0.9]), {}, ["0"]),
    ],
)
def test_a_threshold_that_is_no_number(threshold, notes, skipped):
    net = nn.Sequential(neuron.LIFNode(step_mode="m"))
    net[0].v_threshold = threshold
    report = replace_neurons(net, T=2)
    assert (report.notes, list(report.skipped)) == (notes, skipped)


def test_a_threshold_of_dlif_is_a_number():
    net = nn.Sequential(DLIFNode(T=2))
    net[0].v_threshold = torch.tensor(0.8)
    net(torch.rand(2, 1, 4))
    learned = nn.Parameter(torch.tensor(0.8))
    net[0].v_threshold = learned
    message = "v_threshold"
    with pytest.raises(TypeError, match=message):
        net(torch.rand(2, 1, 4))
    with pytest.raises(TypeError, match=message):
        DLIFNode(T=2, v_threshold=learned)


def test_there_and_back_is_the_network_that_it_was():
    net, x = make_lively()
    net[1].register_forward_hook(called := MagicMock(return_value=None))
    wanted = net(x)
    replace_neurons(net, T=5)
    net[7].v_reset, net[3].input_gain.data[:] = -0.1, 0.4  # a gain that is neither 1 nor 1 / tau
    functional.reset_net(net)
    scaled = net(x)
    assert not torch.equal(scaled, wanted)
    report = dlif_to_lif(net)
    assert report.replaced == dict.fromkeys("1357", "DLIFNode")
    assert report.notes == {
        "3": "potentials are divided by the gain 0.4: v_threshold=1.75, v_reset=0"
    }
    found = [type(node).__name__ for node in net[1::2]]
    assert found == [
        "LIFNode",
        "IFNode",
        "LIFNode",
        "LIFNode",
    ]
    assert [net[1].v_reset, net[7].v_reset, net[3].detach_reset] == [None, -0.1, True]
    assert [net[1].decay_input, net[5].decay_input, net[7].decay_input] == [True, True, True]
    called.reset_mock()
    assert torch.equal(net(x), scaled)
    assert scaled.sum() > 0
    assert called.call_count == 1


@pytest.mark.parametrize("gains", [[1.0, 1.1], [0.0, 0.0], [-1.0, -1.0], [float("nan")] * 2])
def test_gains_that_lif_cannot_have_leave_the_network_alone(gains):
    net = nn.Sequential(nn.Linear(2, 2), DLIFNode(T=2), nn.Linear(2, 2), DLIFNode(T=2))
    net[3].input_gain.data[:] = torch.tensor(gains)
    with pytest.raises(ValueError, match="gains of '3'"):
        dlif_to_lif(net)
    assert isinstance(net[1], DLIFNode)


class Doubled(DLIFNode):
    def multi_step_forward(self, x_seq):
        return 2 * super().multi_step_forward(x_seq)


def test_a_neuron_with_dynamics_of_its_own_stays_and_is_named():
    net = nn.Sequential(DLIFNode(T=2), Doubled(T=2))
    report = dlif_to_lif(net)
    assert [type(node) for node in net] == [neuron.LIFNode, Doubled]
    assert report.skipped == {"1": "Doubled replaces multi_step_forward of DLIFNode"}


@pytest.mark.parametrize("net", [DLIFNode(T=2), nn.Linear(2, 2), nn.Sequential(Doubled(T=2))])
def test_nothing_to_turn_back_is_refused(net):
    with pytest.raises(ValueError, match=r"itself a neuron|no DLIFNode"):
        dlif_to_lif(net)
