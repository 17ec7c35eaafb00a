"""The differentiable loss against gradients of explicit sums over what the test's own hooks have
captured.
"""

import gc
import itertools
import weakref
from dataclasses import dataclass

import pytest
import torch
from perturbation.by_hand import captured, eps_by_hand
from perturbation.networks import NEURONS, T, images, run_pair, storage_bytes, trainable
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from sj_robust.neuron import DLIFNode
from sj_robust.perturbation import MPPDMonitor, tasad
from sj_robust.perturbation.dynamics import spike_train_distance

NAMES = ("2", "4", "8")
LAYERS = [
    ("last", ("8",)),
    ("all", NAMES),
    (["4"], ("4",)),
    (["8", "2"], ("8", "2")),
]
"""What ``loss`` is asked for, and the layers that it then stands for."""


@dataclass(frozen=True)
class Measure:
    """One loss; ``input_gain`` is whether the learnable gain counts."""

    indicator: str
    norm: str
    input_gain: bool = False


MEASURES = [
    Measure("mppd", "l2"),
    Measure("mppd", "l1"),
    Measure("mppd", "l2", input_gain=True),
    Measure("mppd", "l1", input_gain=True),
    Measure("std", "l2"),
    Measure("std", "l1"),
    Measure("tasad", "l2"),
    Measure("tasad", "l1"),
]


@pytest.fixture
def net():
    return trainable("LIF")


class Explicit:
    """The loss as explicit sums over what the test's own hooks have captured."""

    def __init__(self, net, x, x_perturbed):
        self.net = net
        with torch.no_grad():
            self.clean = captured(net, NAMES, x)
        self.perturbed = captured(net, NAMES, x_perturbed)

    def loss(self, names, measure):
        terms = [self.of_layer(name, measure) for name in names]
        return torch.stack(terms).mean()

    def of_layer(self, name, measure):
        difference = self.difference(name, measure)
        if measure.norm == "l2":
            return difference.square().mean()
        return difference.abs().mean()

    def difference(self, name, measure):
        """What the indicator takes the mean square or absolute value of."""
        clean = self.clean[name]
        perturbed = self.perturbed[name]
        if measure.indicator == "mppd":
            decay, gain = decay_and_gain(self.net[int(name)], measure.input_gain)
            gains = torch.as_tensor(gain).expand(T)
            return eps_by_hand(clean.x_seq, perturbed.x_seq, decay, gains)
        spikes = clean.spike_seq.detach().double()
        difference = perturbed.spike_seq.double() - spikes
        if measure.indicator == "std":
            return difference
        return difference.sum(0) / T

    def spike_distance(self, names, distance):
        """Mean over layers of a public distance of the spikes."""
        means = []
        for name in names:
            spikes = self.clean[name].spike_seq
            means.append(distance(spikes, self.perturbed[name].spike_seq).mean())
        return torch.stack(means).mean().detach()


def decay_and_gain(node, input_gain):
    """As the neuron learns them; the paper's form leaves DLIF's learnable gain out."""
    if isinstance(node, neuron.ParametricLIFNode):
        gain = torch.sigmoid(node.w.double())
        return 1 - gain, gain
    if isinstance(node, DLIFNode):
        return node.decay, node.input_gain.double() if input_gain else 1.0
    if isinstance(node, neuron.LIFNode):
        return 0.75, 0.25
    return 1.0, 1.0


def gradients(value, net):
    grads = torch.autograd.grad(
        value,
        list(net.parameters()),
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return [grad.detach() for grad in grads]


def assert_same_gradients(value, expected, net):
    grads = gradients(value, net)
    grads_expected = gradients(expected, net)
    moved = [grad for grad in grads_expected if bool(grad.any())]
    assert len(moved) >= 2
    for grad, grad_expected in zip(grads, grads_expected, strict=True):
        scale = max(float(grad_expected.abs().max()), 1e-3)
        assert_close(grad, grad_expected, rtol=1e-3, atol=1e-5 * scale)


WAYS = ["two runs", "chunks", "single steps", "paired", "inference"]
CASES = [
    *itertools.product(["LIF decay_input", "DLIF"], WAYS, ["statistics"]),
    *itertools.product(["IF", "PLIF"], ["two runs", "paired"], ["statistics"]),
    *itertools.product(["DLIF"], WAYS, ["loss"]),
]


@pytest.mark.parametrize(("kind", "way", "keep"), CASES)
def test_loss_and_gradient_are_those_of_the_explicit_sum(kind, way, keep, pair):
    net = trainable(kind)
    explicit = Explicit(net, *pair)
    monitor = MPPDMonitor(net, keep=keep, spikes=True)
    run_pair(monitor, net, *pair, way)
    has_graph = way != "inference"
    if not has_graph and keep == "statistics":
        # The currents of both runs alone have 28 kB more.
        assert storage_bytes(monitor) < 25_000
    for measure, (layers, names) in itertools.product(MEASURES, LAYERS):
        expected = explicit.loss(names, measure)
        with torch.set_grad_enabled(has_graph):
            value = monitor.loss(
                layers,
                norm=measure.norm,
                input_gain=measure.input_gain,
                indicator=measure.indicator,
            )
        assert_close(value.double(), expected, rtol=1e-4, atol=1e-7)
        assert value > 1e-3
        assert value.dtype == torch.float32
        assert value.requires_grad == has_graph
        if has_graph and (layers, measure.norm) in (("last", "l1"), ("all", "l2")):
            assert_same_gradients(value, expected, net)


@pytest.mark.parametrize(
    ("indicator", "distance"), [("std", spike_train_distance), ("tasad", tasad)]
)
def test_in_l1_the_losses_on_spikes_are_the_public_distances(indicator, distance, net, pair):
    monitor = MPPDMonitor(net, spikes=True)
    run_pair(monitor, net, *pair)
    value = monitor.loss("all", norm="l1", indicator=indicator)
    expected = Explicit(net, *pair).spike_distance(NAMES, distance)
    assert_close(value, expected, check_dtype=False, rtol=1e-5, atol=0)


def test_gradient_of_what_a_neuron_learns(pair):
    for kind, learned in (("PLIF", "w"), ("DLIF", "input_gain")):
        net = trainable(kind)
        monitor = MPPDMonitor(net)
        run_pair(monitor, net, *pair)
        parameter = getattr(net[8], learned)
        value = monitor.loss(input_gain=True)
        (grad,) = torch.autograd.grad(value, parameter, retain_graph=True)
        assert grad.any()
    without = monitor.loss()
    (grad,) = torch.autograd.grad(without, parameter, materialize_grads=True, allow_unused=True)
    assert not grad.any(), "the paper's form leaves the gain of DLIF out"


def test_no_gradient_through_the_clean_run(net, pair, monitor):
    pair = [x.requires_grad_() for x in pair]
    run_pair(monitor, net, *pair)
    value = monitor.loss("all")
    grad, grad_perturbed = torch.autograd.grad(value, pair, allow_unused=True)
    assert grad is None
    assert grad_perturbed.any()
    functional.reset_net(net)
    both = torch.cat(pair, 1).detach().requires_grad_()
    with monitor.paired():
        net(both)
    value = monitor.loss("all")
    (grad,) = torch.autograd.grad(value, both)
    assert not grad[:, :3].any()
    assert grad[:, 3:].any()


def test_last_layer_in_single_steps(pair):
    net = trainable("DLIF")
    values = []
    for way in ("two runs", "single steps"):
        with MPPDMonitor(net, layers="last") as monitor:
            run_pair(monitor, net, *pair, way)
            values.append(monitor.loss())
    assert_close(*values)
    assert_same_gradients(*values, net)


@pytest.mark.parametrize("keep", ["statistics", "loss"])
def test_last_layer_alone_holds_its_own_currents_alone(net, keep):
    x, x_perturbed = images(n=8)
    monitor = MPPDMonitor(net, layers="last", keep=keep)
    held = []

    def note(module, inputs):
        held.append(storage_bytes(monitor))

    for number in (3, 7, 9):
        net[number].register_forward_pre_hook(note)
    functional.reset_net(net)
    with monitor.clean():
        net(x)
    size = 5 if keep == "statistics" else 4  # the currents, with the spikes in bool or without
    conv = T * 8 * 144
    last = T * 8 * 8
    assert held == [size * conv, size * conv, size * last]
    functional.reset_net(net)
    with monitor.perturbed():
        net(x_perturbed)
    assert monitor.loss().requires_grad
    if keep == "statistics":
        assert list(monitor.statistics()) == ["8"]
    monitor.loss(retain=False)
    assert storage_bytes(monitor) < size * last


@pytest.mark.slow
@pytest.mark.parametrize("end", ["retain", "clear", "close", "next"])
def test_no_graph_stays(net, pair, end):
    currents = []

    def note(module, inputs):
        currents.append(weakref.ref(inputs[0]))

    handle = net[8].register_forward_pre_hook(note)
    monitor = MPPDMonitor(net, keep="trace")
    run_pair(monitor, net, *pair)
    handle.remove()
    functional.reset_net(net)
    assert currents[1]() is not None
    if end == "retain":
        monitor.loss(retain=False)
    elif end == "clear":
        monitor.clear_recorded_data()
    elif end == "close":
        monitor.close()
    else:
        with monitor.clean():
            net(pair[0])
    gc.collect()
    assert [current() for current in currents] == [None, None]


def test_an_exception_in_the_perturbed_run_drops_the_pair(net, pair, monitor):
    with monitor.clean():
        net(pair[0])
    functional.reset_net(net)
    failing = net[9].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), monitor.perturbed():
        net(pair[1])
    assert storage_bytes(monitor) == 0
    with pytest.raises(RuntimeError, match="two complete runs"):
        monitor.loss()
    failing.remove()
    run_pair(monitor, net, *pair)
    assert monitor.statistics()["8"].samples == 3


class Halves(nn.Module):
    """A network in two parts."""

    def __init__(self, net):
        super().__init__()
        self.head = net[:5]
        self.tail = net[5:]


class Reentrant(Halves):
    def forward(self, x):
        x = self.head(x)
        if not torch.is_grad_enabled():
            return self.tail(x)
        return checkpoint(self.tail, x, use_reentrant=True)


@pytest.mark.parametrize("way", ["two runs", "paired"])
@pytest.mark.parametrize("keep", ["statistics", "loss"])
def test_a_loss_that_reentrant_checkpointing_leaves_without_gradient_is_refused(keep, way, pair):
    net = Reentrant(trainable("LIF"))
    monitor = MPPDMonitor(net, keep=keep)
    run_pair(monitor, net, *pair, way=way)
    for layers in ("last", "all"):
        with pytest.raises(RuntimeError, match=r"'tail.* ran without .* use_reentrant=False"):
            monitor.loss(layers)
    assert monitor.loss(["head.2"]).requires_grad
    with torch.no_grad():
        value = monitor.loss("last")
        functional.reset_net(net)
        run_pair(monitor, net, *pair, way=way)
    assert_close(monitor.loss("last"), value)  # a run without gradients from the beginning
    net.requires_grad_(False)
    functional.reset_net(net)
    inputs = [x.clone().requires_grad_() for x in pair]  # what reentrant checkpointing asks for
    run_pair(monitor, net, *inputs, way=way)
    assert_close(monitor.loss("last"), value)  # of weights that need no gradient


def test_activation_checkpointing(pair):
    class Checkpointed(Halves):
        def forward(self, x):
            x = checkpoint(self.head, x, use_reentrant=False)
            return self.tail(x)

    net = trainable("DLIF")
    plain = MPPDMonitor(net)
    run_pair(plain, net, *pair)
    expected = plain.loss("all")
    grads_expected = gradients(expected, net)
    functional.reset_net(net)
    # Recomputation in the backward pass must find the neurons as the forward pass did: fresh.
    wrapped = Checkpointed(net)
    monitor = MPPDMonitor(wrapped)
    run_pair(monitor, wrapped, *pair)
    value = monitor.loss("all")
    functional.reset_net(net)
    assert_close(value, expected)
    grads = gradients(value, net)
    assert_close(grads, grads_expected, rtol=1e-4, atol=1e-6)


def test_attached_before_wrapping_in_ddp(tmp_path, pair):
    net = trainable("DLIF")
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


@pytest.mark.parametrize("layers", ["all", "last"])
def test_last_is_the_layer_executed_last_not_the_one_defined_last(layers):
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.late = neuron.IFNode(step_mode="m")
            self.early = neuron.IFNode(step_mode="m")
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            spikes = self.early(self.weight * x)
            return self.late(self.weight * spikes)

    net = Reversed()
    x, x_perturbed = 2 * torch.rand(2, T, 3, 4)
    monitor = MPPDMonitor(net, layers=layers)
    assert monitor.monitored_layers == ["late", "early"]
    run_pair(monitor, net, x, x_perturbed)
    assert monitor.execution_order == ("early", "late")
    last = monitor.loss()
    assert torch.equal(last, monitor.loss(["late"]))
    if layers == "all":
        assert not torch.equal(last, monitor.loss(["early"]))


@pytest.mark.parametrize("kind", ["LIF", "DLIF"])
def test_mixed_precision(kind, pair):
    net = trainable(kind)
    monitor = MPPDMonitor(net)
    with torch.autocast("cpu", torch.bfloat16):
        run_pair(monitor, net, *pair)
        value = monitor.loss("all")
        explicit = Explicit(net, *pair)
    assert explicit.clean["8"].x_seq.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    terms = []
    for name in NAMES:
        x_seq = explicit.clean[name].x_seq
        x_seq_perturbed = explicit.perturbed[name].x_seq
        eps = eps_by_hand(x_seq, x_seq_perturbed, NEURONS[kind].decay, [1.0] * T)
        terms.append(eps.square().mean())
    expected = torch.stack(terms).mean()
    assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    for grad in gradients(value, net):
        assert grad.isfinite().all()


def test_spikes_that_were_changed_in_place_are_refused(net, pair):
    monitor = MPPDMonitor(net, layers=["2"], spikes=True)
    net[2].register_forward_hook(lambda module, inputs, output: output.mul_(2))
    with torch.no_grad():
        run_pair(monitor, net, *pair)
    with pytest.raises(RuntimeError, match="output of layer '2' was changed in place"):
        monitor.loss(["2"], indicator="std")


def test_a_monitor_that_keeps_its_loss_alone_measures_in_compare_and_nowhere_else(net, pair):
    remedy = r"call compare\(x, x_perturbed\), or build it with keep='statistics'"
    with MPPDMonitor(net) as usual, MPPDMonitor(net, keep="loss") as monitor:
        run_pair(monitor, net, *pair)
        with pytest.raises(RuntimeError, match=remedy):
            monitor.statistics()
        with pytest.raises(RuntimeError, match="measures nothing but its loss"):
            monitor["2"]
        found = monitor.compare(*pair)
        expected = usual.compare(*pair)
        assert found.keys() == expected.keys()
        for name, stats in found.items():
            assert stats.to_dict() == expected[name].to_dict()
        before = monitor.statistics()["8"].samples
        run_pair(monitor, net, *pair)
        assert monitor.statistics()["8"].samples == before
