"""The differentiable loss against gradients of explicit sums over what the test's own hooks have
captured.
"""

import gc
import itertools
import weakref

import pytest
import torch
from perturbation.by_hand import captured, eps_by_hand
from perturbation.networks import NEURONS, T, images, run_pair, storage_bytes, trainable
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sj_robust.neuron import DLIFNode
from sj_robust.perturbation import MPPDMonitor, spike_train_distance, tasad

NAMES = ("2", "4", "8")
INDICATORS = [
    ("mppd", False),
    ("mppd", True),
    ("std", False),
    ("tasad", False),
]  # with the learnable gain or without
LAYERS = {"last": ["8"], "all": NAMES, "4": ["4"], "8 2": ["8", "2"]}


@pytest.fixture
def net():
    return trainable(NEURONS["LIF"][0])


def explicit_difference(node, clean, perturbed, indicator, input_gain):
    """What the indicator takes the mean square or absolute value of; decay and gain as the neuron
    learns them.
    """
    if indicator != "mppd":
        difference = perturbed[1].double() - clean[1].detach().double()
        return difference if indicator == "std" else difference.sum(0) / T
    decay, gain = {neuron.IFNode: (1.0, 1.0), neuron.LIFNode: (0.75, 0.25)}.get(
        type(node), (None, None)
    )
    if isinstance(node, neuron.ParametricLIFNode):
        gain = torch.sigmoid(node.w.double())
        decay = 1 - gain
    elif isinstance(node, DLIFNode):  # the paper's form leaves the learnable gain out
        decay, gain = node.decay, node.input_gain.double() if input_gain else 1.0
    return eps_by_hand(clean[0], perturbed[0], decay, torch.as_tensor(gain).expand(T))


def gradients(value, net):
    params = list(net.parameters())
    grads = torch.autograd.grad(
        value, params, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return [grad.detach() for grad in grads]


def assert_same_gradients(value, expected, net, least=2):
    grads, grads_expected = gradients(value, net), gradients(expected, net)
    assert sum(float(g.abs().sum()) > 0 for g in grads_expected) >= least
    for grad, grad_expected in zip(grads, grads_expected, strict=True):
        scale = float(grad_expected.abs().max())
        torch.testing.assert_close(grad, grad_expected, rtol=1e-3, atol=1e-5 * max(scale, 1e-3))


WAYS = ["two runs", "chunks", "single steps", "paired", "inference"]
CASES = [
    *itertools.product(["LIF decay_input", "DLIF"], WAYS, ["statistics"]),
    *itertools.product(["IF", "PLIF"], ["two runs", "paired"], ["statistics"]),
    *itertools.product(["DLIF"], WAYS, ["loss"]),
]


@pytest.mark.parametrize(("kind", "way", "keep"), CASES)
def test_loss_and_gradient_are_those_of_the_explicit_sum(kind, way, keep, pair):
    net = trainable(NEURONS[kind][0])
    with torch.no_grad():
        clean = captured(net, NAMES, pair[0])
    perturbed = captured(net, NAMES, pair[1])
    monitor = MPPDMonitor(net, keep=keep, spikes=True)
    run_pair(monitor, net, *pair, way)
    if (
        way == "inference" and keep == "statistics"
    ):  # the currents of both runs alone have 28 kB more
        assert sum(storage_bytes(monitor)) < 25_000
    for (indicator, flag), norm in itertools.product(INDICATORS, ("l2", "l1")):
        differences = {
            name: explicit_difference(net[int(name)], clean[name], perturbed[name], indicator, flag)
            for name in NAMES
        }
        for layers, names in LAYERS.items():
            expected = torch.stack(
                [(d**2 if norm == "l2" else d.abs()).mean() for d in map(differences.get, names)]
            )
            with torch.set_grad_enabled(way != "inference"):
                chosen = layers if layers in ("last", "all") else names
                value = monitor.loss(chosen, norm, flag, indicator=indicator)
            torch.testing.assert_close(value.double(), expected.mean(), rtol=1e-4, atol=1e-7)
            assert value > 1e-3
            assert value.dtype == torch.float32
            assert value.requires_grad == (way != "inference")
            if way != "inference" and (layers, norm) in (("last", "l1"), ("all", "l2")):
                assert_same_gradients(value, expected.mean(), net)
            if norm == "l1" and indicator != "mppd":
                distance = {"std": spike_train_distance, "tasad": tasad}[indicator]
                mean = torch.stack(
                    [distance(clean[name][1], perturbed[name][1]).mean() for name in names]
                ).mean()
                torch.testing.assert_close(
                    value, mean.detach(), check_dtype=False, rtol=1e-5, atol=0
                )
    if way == "two runs" and kind in ("PLIF", "DLIF"):
        learned = net[8].w if kind == "PLIF" else net[8].input_gain
        (grad,) = torch.autograd.grad(monitor.loss(input_gain=True), learned, retain_graph=True)
        assert float(grad.abs().max()) > 0
        assert kind == "PLIF" or float(gradients(monitor.loss(), net)[-3].abs().max()) == 0


def test_no_gradient_through_the_clean_run(net, pair, monitor):
    pair = [x.requires_grad_() for x in pair]
    run_pair(monitor, net, *pair)
    grad, grad_perturbed = torch.autograd.grad(monitor.loss("all"), pair, allow_unused=True)
    assert grad is None
    assert float(grad_perturbed.abs().max()) > 0
    functional.reset_net(net)
    both = torch.cat(pair, 1).detach().requires_grad_()
    with monitor.paired():
        net(both)
    (grad,) = torch.autograd.grad(monitor.loss("all"), both)
    assert float(grad[:, :3].abs().max()) == 0
    assert float(grad[:, 3:].abs().max()) > 0


def test_last_layer_in_single_steps(pair):
    net = trainable(NEURONS["DLIF"][0])
    values = []
    for way in ("two runs", "single steps"):
        with MPPDMonitor(net, layers="last") as monitor:
            run_pair(monitor, net, *pair, way)
            values.append(monitor.loss())
    torch.testing.assert_close(*values)
    assert_same_gradients(*values, net)


@pytest.mark.parametrize(
    ("keep", "size"), [("statistics", 5), ("loss", 4)]
)  # the spikes in bool, or without them
def test_last_layer_alone_holds_its_own_currents_alone(net, keep, size):
    x, x_perturbed = images(n=8)
    monitor = MPPDMonitor(net, layers="last", keep=keep)
    held = []
    for name in ("3", "7", "9"):
        net[int(name)].register_forward_pre_hook(
            lambda *_: held.append(sum(storage_bytes(monitor)))
        )
    functional.reset_net(net)
    with monitor.clean():
        net(x)
    conv, last = T * 8 * 144, T * 8 * 8
    assert held == [size * conv, size * conv, size * last]
    functional.reset_net(net)
    with monitor.perturbed():
        net(x_perturbed)
    assert monitor.loss().requires_grad
    if keep == "statistics":
        assert list(monitor.statistics()) == ["8"]
    monitor.loss(retain=False)
    assert sum(storage_bytes(monitor)) < size * last


@pytest.mark.slow
@pytest.mark.parametrize("end", ["retain", "clear", "close", "next"])
def test_no_graph_stays(net, pair, end):
    currents = []
    handle = net[8].register_forward_pre_hook(
        lambda _, inputs: currents.append(weakref.ref(inputs[0]))
    )
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
    assert sum(storage_bytes(monitor)) == 0
    with pytest.raises(RuntimeError, match="two complete runs"):
        monitor.loss()
    failing.remove()
    run_pair(monitor, net, *pair)
    assert monitor.statistics()["8"].samples == 3


def test_activation_checkpointing(pair):
    class Checkpointed(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.head, self.tail = net[:5], net[5:]

        def forward(self, x):
            return self.tail(checkpoint(self.head, x, use_reentrant=False))

    net = trainable(NEURONS["DLIF"][0])
    plain = MPPDMonitor(net)
    run_pair(plain, net, *pair)
    expected = plain.loss("all").double()
    grads = gradients(expected, net)
    functional.reset_net(net)
    # Recomputation in the backward pass must find the neurons as the forward pass did: fresh.
    wrapped = Checkpointed(net)
    monitor = MPPDMonitor(wrapped)
    run_pair(monitor, wrapped, *pair)
    value = monitor.loss("all")
    functional.reset_net(net)
    torch.testing.assert_close(value.double(), expected)
    for grad, grad_expected in zip(gradients(value, net), grads, strict=True):
        torch.testing.assert_close(grad, grad_expected, rtol=1e-4, atol=1e-6)


def test_attached_before_wrapping_in_ddp(tmp_path, pair):
    net = trainable(NEURONS["DLIF"][0])
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
            torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("layers", ["all", "last"])
def test_last_is_the_layer_executed_last_not_the_one_defined_last(layers):
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.late = neuron.IFNode(step_mode="m")
            self.early = neuron.IFNode(step_mode="m")
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.late(self.weight * self.early(self.weight * x))

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
    net = trainable(NEURONS[kind][0])
    monitor = MPPDMonitor(net)
    with torch.autocast("cpu", torch.bfloat16):
        run_pair(monitor, net, *pair)
        value = monitor.loss("all")
        with torch.no_grad():
            clean = captured(net, NAMES, pair[0])
        perturbed = captured(net, NAMES, pair[1])
    assert clean["8"][0].dtype == torch.bfloat16
    assert value.dtype == torch.float32
    decay = NEURONS[kind][1]
    terms = [
        eps_by_hand(clean[name][0], perturbed[name][0], decay, [1.0] * T).square().mean()
        for name in NAMES
    ]
    torch.testing.assert_close(value.double(), torch.stack(terms).mean(), rtol=1e-5, atol=1e-7)
    assert all(bool(grad.isfinite().all()) for grad in gradients(value, net))


def test_spikes_are_kept_on_request_and_unchanged(net, pair, monitor):
    run_pair(monitor, net, *pair)
    with pytest.raises(ValueError, match="needs the spikes: build the monitor with spikes=True"):
        monitor.loss(indicator="std")
    with pytest.raises(ValueError, match=r"indicator must be one of .*'mppd', .*got 'rate'"):
        monitor.loss(indicator="rate")
    monitor = MPPDMonitor(net, layers=["2"], spikes=True)
    net[2].register_forward_hook(lambda module, inputs, output: output.mul_(2))
    with torch.no_grad():
        run_pair(monitor, net, *pair)
    with pytest.raises(RuntimeError, match="output of layer '2' was changed in place"):
        monitor.loss(["2"], indicator="std")


def test_a_monitor_that_keeps_its_loss_alone_measures_in_compare_and_nowhere_else(net, pair):
    with MPPDMonitor(net) as usual, MPPDMonitor(net, keep="loss") as monitor:
        run_pair(monitor, net, *pair)
        with pytest.raises(
            RuntimeError,
            match=r"call compare\(x, x_perturbed\), or build it with keep='statistics'",
        ):
            monitor.statistics()
        with pytest.raises(RuntimeError, match="measures nothing beside its loss"):
            monitor["2"]
        found, expected = (
            {name: stats.to_dict() for name, stats in each.compare(*pair).items()}
            for each in (monitor, usual)
        )
        assert found == expected
        before = monitor.statistics()["8"].samples
        run_pair(monitor, net, *pair)
        assert monitor.statistics()["8"].samples == before
