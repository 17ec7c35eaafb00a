"""The differentiable loss against gradients of explicit sums over currents captured by the test's own hooks."""

import gc
import weakref

import pytest
import torch
from perturbation.networks import NEURONS, T, conv_net, images, in_steps, recurrent_net, storage_bytes
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sj_robust import SpikingClassifier
from sj_robust.neuron import DLIFNode
from sj_robust.perturbation import MPPDMonitor

NAMES = ("2", "4", "8")


def trainable(make):
    """In training mode, where neurons of both releases have a gradient, but with fixed batch norm."""
    net = conv_net(make).train()
    net[1].eval()
    return net


def run_with_currents(net, names, x, run=None):
    """Input currents [T, N, *] with their graph, by name."""
    seen = {name: [] for name in names}

    def hook(name):
        def keep(module, inputs):
            seen[name].extend([inputs[0]] if module.step_mode == "s" else inputs[0])

        return keep

    handles = [net.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    functional.reset_net(net)
    (run or net)(x)
    functional.reset_net(net)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(steps) for name, steps in seen.items()}


def explicit_loss(x, x_perturbed, decay, gain, norm):
    """MS-MPPD by the matrix of powers of the decay, in float64."""
    matrix = torch.tensor([[float(k <= t) for k in range(len(x))] for t in range(len(x))], dtype=torch.float64)
    powers = torch.tensor([[float(max(t - k, 0)) for k in range(len(x))] for t in range(len(x))], dtype=torch.float64)
    weights = matrix * torch.as_tensor(decay, dtype=torch.float64) ** powers * gain
    eps = torch.einsum("tk,k...->t...", weights, x.detach().double() - x_perturbed.double())
    return (eps**2 if norm == "l2" else eps.abs()).mean()


def two_runs(monitor, net, x, x_perturbed, run=None):
    for context, a in ((monitor.clean, x), (monitor.perturbed, x_perturbed)):
        functional.reset_net(net)
        with context():
            (run or net)(a)


def gradients(value, net):
    params = list(net.parameters())
    return torch.autograd.grad(value, params, retain_graph=True, allow_unused=True, materialize_grads=True)


def assert_same_loss_and_gradients(value, expected, net):
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-7)
    grads, grads_expected = gradients(value, net), gradients(expected, net)
    assert sum(float(g.abs().sum()) > 0 for g in grads_expected) >= 2
    for grad, grad_expected in zip(grads, grads_expected, strict=True):
        scale = float(grad_expected.abs().max())
        torch.testing.assert_close(grad, grad_expected, rtol=1e-3, atol=1e-5 * max(scale, 1e-3))


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("layers", ["last", "all", ["4"], ["8", "2"]])
@pytest.mark.parametrize("kind", ["LIF decay_input", "IF", "DLIF"])
def test_loss_and_gradient_are_those_of_the_explicit_sum(kind, layers, norm):
    make, decay, gain, _ = NEURONS[kind]
    net = trainable(make)
    x, x_perturbed = images()
    monitor = MPPDMonitor(net)
    two_runs(monitor, net, x, x_perturbed)
    chosen = {"last": ["8"], "all": NAMES}.get(layers) if isinstance(layers, str) else layers
    with torch.no_grad():
        clean = run_with_currents(net, NAMES, x)
    perturbed = run_with_currents(net, NAMES, x_perturbed)
    fixed = gain if isinstance(gain, float) else 1.0  # the paper's form leaves the learnable gain out
    terms = [explicit_loss(clean[name], perturbed[name], decay, fixed, norm) for name in chosen]
    assert_same_loss_and_gradients(monitor.loss(layers, norm), torch.stack(terms).mean(), net)


def test_learnable_gain_and_decay_are_part_of_the_gradient_where_they_are_part_of_the_loss():
    for kind, learned in (("DLIF", "input_gain"), ("PLIF", "w")):
        net = trainable(NEURONS[kind][0])
        x, x_perturbed = images()
        monitor = MPPDMonitor(net)
        two_runs(monitor, net, x, x_perturbed)
        with torch.no_grad():
            clean = run_with_currents(net, NAMES, x)
        perturbed = run_with_currents(net, NAMES, x_perturbed)
        node = net[8]
        if kind == "DLIF":
            decay, gain = node.decay, node.input_gain.double()
            value, plain = monitor.loss(input_gain=True), monitor.loss()
            assert float(gradients(plain, net)[-3].abs().max()) == 0
        else:
            rate = torch.sigmoid(node.w.double())
            decay, gain, value = 1 - rate, rate, monitor.loss()
        expected = explicit_loss(clean["8"], perturbed["8"], decay, gain, "l2")
        assert_same_loss_and_gradients(value, expected, net)
        (grad,) = torch.autograd.grad(monitor.loss(input_gain=True), getattr(node, learned))
        assert float(grad.abs().max()) > 0


@pytest.mark.parametrize("kind", ["LIF", "DLIF"])
def test_concatenated_batch_equals_two_runs(kind):
    net = trainable(NEURONS[kind][0])
    x, x_perturbed = images()
    monitor = MPPDMonitor(net)
    two_runs(monitor, net, x, x_perturbed)
    for norm in ("l2", "l1"):
        for flag in (False, True):
            expected = monitor.loss("all", norm, flag).double()
            paired = MPPDMonitor(net)
            functional.reset_net(net)
            with paired.paired():
                net(torch.cat((x, x_perturbed), 1))
            assert_same_loss_and_gradients(paired.loss("all", norm, flag), expected, net)


def test_no_gradient_through_the_clean_run():
    net = trainable(NEURONS["LIF"][0])
    x, x_perturbed = (a.requires_grad_() for a in images())
    monitor = MPPDMonitor(net)
    two_runs(monitor, net, x, x_perturbed)
    grad, grad_perturbed = torch.autograd.grad(monitor.loss("all"), (x, x_perturbed), allow_unused=True)
    assert grad is None
    assert float(grad_perturbed.abs().max()) > 0
    functional.reset_net(net)
    both = torch.cat((x, x_perturbed), 1).detach().requires_grad_()
    with monitor.paired():
        net(both)
    (grad,) = torch.autograd.grad(monitor.loss("all"), both)
    assert float(grad[:, :3].abs().max()) == 0
    assert float(grad[:, 3:].abs().max()) > 0


@pytest.mark.parametrize("layers", ["last", "all"])
def test_single_steps_and_recurrent_containers(layers):
    x, x_perturbed = images()
    net = trainable(NEURONS["DLIF"][0])
    whole = MPPDMonitor(net, layers=layers)
    two_runs(whole, net, x, x_perturbed)
    expected = whole.loss(layers).double()
    functional.set_step_mode(net, "s")
    stepped = MPPDMonitor(net, layers=layers)
    two_runs(stepped, net, x, x_perturbed, run=in_steps(net))
    assert_same_loss_and_gradients(stepped.loss(layers), expected, net)

    net = recurrent_net().train()
    x = 3 * torch.rand(T, 4, 5, generator=torch.Generator().manual_seed(0))
    monitor = MPPDMonitor(net)
    two_runs(monitor, net, x, x + 0.5)
    with torch.no_grad():
        clean = run_with_currents(net, ["2.sn"], x)
    perturbed = run_with_currents(net, ["2.sn"], x + 0.5)
    expected = explicit_loss(clean["2.sn"], perturbed["2.sn"], 0.5, 1.0, "l2")
    assert_same_loss_and_gradients(monitor.loss(["2.sn"]), expected, net)


def test_training_step_with_a_classifier():
    net = trainable(lambda: DLIFNode(T=T))
    classifier = SpikingClassifier(net, T=T).train()
    image, noisy = torch.rand(2, 5, 2, 6, 6)
    parameters = {name: p for name, p in net.named_parameters() if not name.startswith("1.")}

    def gradients(of_logits, of_potential):
        net.zero_grad()
        with MPPDMonitor(classifier, layers="last") as monitor:
            with monitor.clean():
                logits = classifier(image)
            with monitor.perturbed():
                logits_perturbed = classifier(noisy)
            loss = of_logits * (logits + logits_perturbed).square().mean()
            (loss + of_potential * monitor.loss(retain=False)).backward()
        return {name: p.grad.clone() for name, p in parameters.items()}

    both, of_logits, of_potential = gradients(1, 1), gradients(1, 0), gradients(0, 1)
    for name in parameters:
        torch.testing.assert_close(both[name], of_logits[name] + of_potential[name])
        assert float(both[name].abs().sum()) > 0, name


def test_value_without_gradients():
    net = trainable(NEURONS["DLIF"][0])
    x, x_perturbed = images()
    monitor = MPPDMonitor(net)
    two_runs(monitor, net, x, x_perturbed)
    expected = {key: monitor.loss("all", *key) for key in (("l2", False), ("l2", True), ("l1", False), ("l1", True))}
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            two_runs(monitor, net, x, x_perturbed)
            assert sum(storage_bytes(monitor)) < 20_000
        for key, value in expected.items():
            found = monitor.loss("all", *key)
            assert not found.requires_grad
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, value.detach(), rtol=1e-5, atol=1e-7)


def test_last_layer_alone_holds_its_own_currents_alone():
    net = trainable(NEURONS["LIF"][0])
    x, x_perturbed = images(n=8)
    monitor = MPPDMonitor(net, layers="last")
    held = []
    for name in ("3", "7", "9"):
        net[int(name)].register_forward_pre_hook(lambda *_: held.append(sum(storage_bytes(monitor))))
    functional.reset_net(net)
    with monitor.clean():
        net(x)
    conv, last = T * 8 * 144, T * 8 * 8
    # Currents in float32 and spikes in bool of the latest layer only.
    assert held == [5 * conv, 5 * conv, 5 * last]
    functional.reset_net(net)
    with monitor.perturbed():
        net(x_perturbed)
    assert monitor.loss().requires_grad
    assert list(monitor.statistics()) == ["8"]
    monitor.loss(retain=False)
    assert sum(storage_bytes(monitor)) < 5 * last


@pytest.mark.slow
@pytest.mark.parametrize("end", ["retain", "clear", "close", "next"])
def test_no_graph_stays(end):
    net = trainable(NEURONS["LIF"][0])
    x, x_perturbed = images()
    currents = []
    handle = net[8].register_forward_pre_hook(lambda _, inputs: currents.append(weakref.ref(inputs[0])))
    monitor = MPPDMonitor(net, keep="trace")
    two_runs(monitor, net, x, x_perturbed)
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
            net(x)
    gc.collect()
    assert [current() for current in currents] == [None, None]


def test_an_exception_in_the_perturbed_run_drops_the_pair():
    net = trainable(NEURONS["LIF"][0])
    x, x_perturbed = images()
    monitor = MPPDMonitor(net)
    with monitor.clean():
        net(x)
    functional.reset_net(net)
    failing = net[9].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), monitor.perturbed():
        net(x_perturbed)
    assert sum(storage_bytes(monitor)) == 0
    with pytest.raises(RuntimeError, match="two complete runs"):
        monitor.loss()
    failing.remove()
    two_runs(monitor, net, x, x_perturbed)
    assert monitor.statistics()["8"].samples == 3


def test_activation_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.head, self.tail = net[:5], net[5:]

        def forward(self, x):
            return self.tail(checkpoint(self.head, x, use_reentrant=False))

    x, x_perturbed = images()
    net = trainable(NEURONS["DLIF"][0])
    plain = MPPDMonitor(net)
    two_runs(plain, net, x, x_perturbed)
    expected = plain.loss("all").double()
    grads = gradients(expected, net)
    functional.reset_net(net)
    # Recomputation in the backward pass must find the neurons as the forward pass did: fresh.
    wrapped = Checkpointed(net)
    monitor = MPPDMonitor(wrapped)
    two_runs(monitor, wrapped, x, x_perturbed)
    value = monitor.loss("all")
    functional.reset_net(net)
    torch.testing.assert_close(value.double(), expected)
    for grad, grad_expected in zip(gradients(value, net), grads, strict=True):
        torch.testing.assert_close(grad, grad_expected, rtol=1e-4, atol=1e-6)


def test_attached_before_wrapping_in_ddp(tmp_path):
    net = trainable(NEURONS["DLIF"][0])
    x, x_perturbed = images()
    monitor = MPPDMonitor(net)
    two_runs(monitor, net, x, x_perturbed)
    grads = gradients(monitor.loss("all"), net)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(net, find_unused_parameters=True)
        two_runs(monitor, net, x, x_perturbed, run=wrapped)
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
    two_runs(monitor, net, x, x_perturbed)
    assert monitor.execution_order == ("early", "late")
    last = monitor.loss()
    assert torch.equal(last, monitor.loss(["late"]))
    if layers == "all":
        assert not torch.equal(last, monitor.loss(["early"]))


@pytest.mark.parametrize("kind", ["LIF", "DLIF"])
def test_mixed_precision(kind):
    net = trainable(NEURONS[kind][0])
    x, x_perturbed = images()
    monitor = MPPDMonitor(net)
    with torch.autocast("cpu", torch.bfloat16):
        two_runs(monitor, net, x, x_perturbed)
        value = monitor.loss("all")
        with torch.no_grad():
            clean = run_with_currents(net, NAMES, x)
        perturbed = run_with_currents(net, NAMES, x_perturbed)
    assert clean["8"].dtype == torch.bfloat16
    assert value.dtype == torch.float32
    _, decay, _, _ = NEURONS[kind]
    terms = [explicit_loss(clean[name], perturbed[name], decay, 1.0, "l2") for name in NAMES]
    torch.testing.assert_close(value.double(), torch.stack(terms).mean(), rtol=1e-5, atol=1e-7)
    assert all(bool(grad.isfinite().all()) for grad in gradients(value, net))
