"""The differentiable loss against gradients of explicit sums over what the test's own hooks have
captured.
"""

import itertools

import pytest
import torch
from perturbation.by_hand import captured, eps_by_hand
from perturbation.networks import NAMES, T, conv_net, run_pair
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from sj_robust.neuron import DLIFNode
from sj_robust.perturbation import MPPDMonitor

LAYERS = [("last", ("8",)), ("all", NAMES), (["4"], ("4",)), (["8", "2"], ("8", "2"))]
"""What ``loss`` is asked for, and the layers that it then stands for."""

MEASURES = [
    {"indicator": indicator, "norm": norm, "input_gain": input_gain}
    for indicator, input_gain in (("mppd", False), ("mppd", True), ("std", False), ("tasad", False))
    for norm in ("l2", "l1")
]


class Explicit:
    """The loss as explicit sums over what the test's own hooks have captured."""

    def __init__(self, net, x, x_perturbed):
        self.net = net
        with torch.no_grad():
            self.clean = captured(net, NAMES, x)
        self.perturbed = captured(net, NAMES, x_perturbed)

    def loss(self, names, norm="l2", **measure):
        terms = []
        for name in names:
            difference = self.difference(name, **measure)
            terms.append(difference.square().mean() if norm == "l2" else difference.abs().mean())
        return torch.stack(terms).mean()

    def difference(self, name, indicator="mppd", input_gain=False):
        """What the indicator takes the mean square or absolute value of."""
        clean, perturbed = self.clean[name], self.perturbed[name]
        if indicator == "mppd":
            decay, gain = decay_and_gain(self.net[int(name)], input_gain)
            return eps_by_hand(clean.x, perturbed.x, decay, torch.as_tensor(gain).expand(T))
        difference = perturbed.spikes.double() - clean.spikes.double()
        return difference if indicator == "std" else difference.mean(0)


def decay_and_gain(node, input_gain):
    """As the neuron learns them; the paper's form leaves DLIF's learnable gain out."""
    if isinstance(node, neuron.ParametricLIFNode):
        gain = torch.sigmoid(node.w.double())
        return 1 - gain, gain
    if isinstance(node, DLIFNode):
        return node.decay, node.input_gain.double() if input_gain else 1.0
    if isinstance(node, neuron.LIFNode):
        return 0.75, 0.25 if node.decay_input else 1.0
    return 1.0, 1.0


def gradients(value, net):
    parameters = list(net.parameters())
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(value, parameters, **options)


def assert_same_gradients(value, expected, net):
    grads_expected = gradients(expected, net)
    assert sum(bool(grad.any()) for grad in grads_expected) >= 2
    for grad, grad_expected in zip(gradients(value, net), grads_expected, strict=True):
        scale = max(float(grad_expected.detach().abs().max()), 1e-3)
        assert_close(grad, grad_expected, rtol=1e-3, atol=1e-5 * scale)


WAYS = ["two runs", "chunks", "single steps", "inference"]
CASES = [
    *itertools.product(["LIF decay_input", "DLIF"], WAYS, ["statistics"]),
    *itertools.product(["IF", "PLIF"], ["two runs"], ["statistics"]),
    *itertools.product(["DLIF"], WAYS, ["loss"]),
]


@pytest.mark.parametrize(("kind", "way", "keep"), CASES)
def test_loss_and_gradient_are_those_of_the_explicit_sum(kind, way, keep, pair):
    net = conv_net(kind)
    explicit = Explicit(net, *pair)
    monitor = MPPDMonitor(net, keep=keep, spikes=True)
    run_pair(monitor, net, *pair, way)
    has_graph = way != "inference"
    for measure, (layers, names) in itertools.product(MEASURES, LAYERS):
        expected = explicit.loss(names, **measure)
        with torch.set_grad_enabled(has_graph):
            value = monitor.loss(layers, **measure)
        assert_close(value.double(), expected, rtol=1e-4, atol=1e-7)
        assert value > 1e-3
        assert value.dtype == torch.float32
        assert value.requires_grad == has_graph
        if has_graph and (layers, measure["norm"]) in (("last", "l1"), ("all", "l2")):
            assert_same_gradients(value, expected, net)


def test_no_gradient_through_the_clean_run(net, pair, monitor):
    pair = [x.requires_grad_() for x in pair]
    run_pair(monitor, net, *pair)
    grad, grad_perturbed = torch.autograd.grad(monitor.loss("all"), pair, allow_unused=True)
    assert grad is None
    assert grad_perturbed.any()


class Halves(nn.Module):
    """A network in two parts, of which one or both are recomputed in the backward pass."""

    def __init__(self, net, *reentrant):
        super().__init__()
        self.head = net[:5]
        self.tail = net[5:]
        self.reentrant = reentrant

    def forward(self, x):
        for part, use_reentrant in zip((self.head, self.tail), self.reentrant, strict=True):
            if use_reentrant is None or not torch.is_grad_enabled():
                x = part(x)
            else:
                x = checkpoint(part, x, use_reentrant=use_reentrant)
        return x


@pytest.mark.parametrize("keep", ["statistics", "loss"])
def test_a_loss_that_reentrant_checkpointing_leaves_without_gradient_is_refused(keep, pair):
    net = Halves(conv_net("LIF"), None, True)
    monitor = MPPDMonitor(net, keep=keep)
    run_pair(monitor, net, *pair)
    for layers in ("last", "all"):
        with pytest.raises(RuntimeError, match=r"'tail.* use_reentrant=False"):
            monitor.loss(layers)
    assert monitor.loss(["head.2"]).requires_grad
    with torch.no_grad():
        value = monitor.loss("last")
        run_pair(monitor, net, *pair)
    assert_close(monitor.loss("last"), value)  # a run without gradients from the beginning
    net.requires_grad_(False)
    inputs = [x.clone().requires_grad_() for x in pair]  # what reentrant checkpointing asks for
    run_pair(monitor, net, *inputs)
    assert_close(monitor.loss("last"), value)  # of weights that need no gradient


def test_activation_checkpointing(pair):
    net = conv_net("DLIF")
    found = []
    # Recomputation in the backward pass must find the neurons as the forward pass did: fresh.
    for whole in (net, Halves(net, False, None)):
        monitor = MPPDMonitor(whole)
        run_pair(monitor, whole, *pair)
        value = monitor.loss("all")
        functional.reset_net(net)
        found.append([value.detach(), *gradients(value, net)])
        monitor.close()
    assert_close(*found, rtol=1e-4, atol=1e-6)


def test_attached_before_wrapping_in_ddp(tmp_path, pair):
    net = conv_net("DLIF")
    monitor = MPPDMonitor(net)
    run_pair(monitor, net, *pair)
    grads = gradients(monitor.loss("all"), net)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(net, find_unused_parameters=True)
        run_pair(monitor, net, *pair, run=wrapped)
        monitor.loss("all").backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        if parameter.grad is not None:
            assert_close(parameter.grad, grad)


class Reversed(nn.Module):
    """Its layer that is executed last is defined first."""

    def __init__(self):
        super().__init__()
        self.late = neuron.IFNode(step_mode="m")
        self.early = neuron.IFNode(step_mode="m")
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        spikes = self.early(self.weight * x)
        return self.late(self.weight * spikes)


@pytest.mark.parametrize("layers", ["all", "last"])
def test_last_is_the_layer_executed_last_not_the_one_defined_last(layers):
    net = Reversed()
    monitor = MPPDMonitor(net, layers=layers)
    assert monitor.monitored_layers == ["late", "early"]
    for way in ("two runs", "single steps"):  # the first finds out which layer is the last
        run_pair(monitor, net, *(2 * torch.rand(2, T, 3, 4)), way)
        assert monitor.execution_order == ("early", "late")
        last = monitor.loss()
        assert torch.equal(last, monitor.loss(["late"]))
        assert list(monitor.statistics())[-1] == "late"
        if layers == "all":
            assert not torch.equal(last, monitor.loss(["early"]))


@pytest.mark.parametrize("kind", ["LIF", "DLIF"])
def test_mixed_precision(kind, pair):
    net = conv_net(kind)
    monitor = MPPDMonitor(net)
    with torch.autocast("cpu", torch.bfloat16):
        run_pair(monitor, net, *pair)
        value = monitor.loss("all")
        explicit = Explicit(net, *pair)
    assert explicit.clean["8"].x.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    assert_close(value.double(), explicit.loss(NAMES), rtol=1e-5, atol=1e-7)
    for grad in gradients(value, net):
        assert grad.isfinite().all()


def test_a_monitor_that_keeps_its_loss_alone_measures_in_compare_and_nowhere_else(net, pair):
    with MPPDMonitor(net) as usual, MPPDMonitor(net, keep="loss") as monitor:
        run_pair(monitor, net, *pair)
        for measured in (monitor.statistics, lambda: monitor["2"]):
            with pytest.raises(RuntimeError, match="keep='statistics'"):
                measured()
        found = monitor.compare(*pair)
        expected = usual.compare(*pair)
        assert {name: stats.to_dict() for name, stats in found.items()} == {
            name: stats.to_dict() for name, stats in expected.items()
        }
        run_pair(monitor, net, *pair)
        assert monitor.statistics()["8"].samples == 3
