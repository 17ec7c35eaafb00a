"""Neurons that cannot be followed, and errors that say what to do."""

import contextlib
import copy
from functools import partial

import pytest
import torch
from perturbation.networks import (
    Leaky,
    Shared,
    T,
    images,
    in_steps,
    inputs,
    linear_net,
    run_pair,
)
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.neuron import DLIFNode
from sj_robust.perturbation import MPPDMonitor

PAIR = inputs(5, 6)


class MyLIF(neuron.LIFNode):
    """It fires at half the threshold."""

    def neuronal_fire(self):
        return self.surrogate_function(self.v - self.v_threshold / 2)


class Halving(Leaky):
    """Its potential after a spike is nothing a BaseNode knows."""

    def potential_after(self, h, spike):
        return h - 0.5 * spike * h


OF_ONE_RELEASE = {
    "LIAFNode": {"act": torch.relu, "threshold_related": False},
    "PSN": {"T": T},
    "GatedLIFNode": {"T": T},
    "CUBALIFNode": {},
    "ILIFNode": {},
    "ComplementaryLIFNode": {},
    "NonSpikingLIFNode": {},
}
"""Neurons that one of the two releases does not have, or cannot build, and their arguments."""


def test_neurons_that_cannot_be_followed_are_named_in_one_warning():
    others = [neuron.KLIFNode(), neuron.QIFNode(), MyLIF()]
    for name, arguments in OF_ONE_RELEASE.items():
        with contextlib.suppress(AttributeError):
            others.append(getattr(neuron, name)(**arguments))
    net = nn.Sequential(neuron.LIFNode(step_mode="m"), *others)
    with pytest.warns(UserWarning, match=rf"{len(others)} neuron\(s\): '1'.*KLIF") as caught:
        monitor = MPPDMonitor(net)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert monitor.monitored_layers == ["0"]
    assert len(monitor.unsupported) == len(others)
    for name, reason in monitor.unsupported.items():
        assert type(net[int(name)]).__name__ in reason
    if hasattr(neuron, "PSN"):
        with pytest.raises(ValueError, match="PSN"):
            MPPDMonitor(linear_net(neuron.PSN(T=T)), decay={neuron.PSN: 0.5})


def unfollowed(*neurons, **options):
    """A monitor of a network of which some neurons cannot be followed."""
    net = linear_net(*neurons)
    with pytest.warns(UserWarning, match="does not follow"):
        return net, MPPDMonitor(net, **options)


def test_the_last_layer_is_the_last_that_spikes_and_is_not_guessed():
    message = "last spiking layer '3'"
    net, monitor = unfollowed(neuron.LIFNode(), neuron.KLIFNode(), layers="last")
    with pytest.raises(RuntimeError, match=message):
        run_pair(monitor, net, *PAIR)
    net, monitor = unfollowed(neuron.LIFNode(), neuron.KLIFNode())
    run_pair(monitor, net, *PAIR)
    with pytest.raises(RuntimeError, match=message):
        monitor.loss()
    assert monitor.loss(["1"]).requires_grad
    if hasattr(neuron, "NonSpikingLIFNode"):
        nodes = neuron.LIFNode(), neuron.LIFNode(), type("Mine", (neuron.NonSpikingLIFNode,), {})()
        net, monitor = unfollowed(*nodes)
        run_pair(monitor, net, *PAIR)
        assert torch.equal(monitor.loss(), monitor.loss(["3"]))


def test_full_perturbation_is_left_out_where_the_potential_is_another():
    net = linear_net(Halving(), neuron.IFNode())
    monitor = MPPDMonitor(net, decay={Halving: 0.6}, gain={Halving: 0.5})
    with pytest.warns(UserWarning, match="potential of 1 "):
        stats = monitor.compare(*PAIR)
    assert stats["1"].full_ms_mppd is None
    assert stats["1"].to_dict()["summary"]["full_l1"] is None
    assert "full" not in repr(stats["1"])
    assert stats["1"].ms_mppd.sum() > 0
    assert stats["3"].full_ms_mppd is not None
    monitor.compare(*PAIR)  # warns once


@pytest.mark.parametrize(("samples", "wrong"), [(5, 0), (T, 1)])
def test_a_neuron_left_in_single_steps_is_named(samples, wrong):
    nodes = [neuron.IFNode(), neuron.IFNode()]
    net = linear_net(*nodes)
    nodes[wrong].step_mode = "s"
    x = torch.rand(T, samples, 6)
    with MPPDMonitor(net) as monitor:
        with pytest.raises(ValueError, match=rf"^{2 * wrong + 1} .*set_step_mode"):
            monitor.compare(x, x + 0.1)
        assert len(monitor.compare(x, x + 0.1, forward=net)) == 2


def shorter(monitor, net, x, x_perturbed):
    """A second pair with fewer steps."""
    run_pair(monitor, net, x, x_perturbed)
    run_pair(monitor, net, x[:2], x_perturbed[:2])


def no_reset(monitor, net, x, x_perturbed):
    with monitor.clean():
        net(x)
    with monitor.perturbed():
        net(x_perturbed)


def another_batch(monitor, net, x, x_perturbed):
    net(x)
    with monitor.clean():
        net(x[:, :2])


def reset_inside(monitor, net, x, x_perturbed):
    with monitor.clean():
        in_steps(SpikingClassifier(net, T=T))(x)


def nested(monitor, net, x, x_perturbed):
    with monitor.clean(), monitor.clean():
        pass


def compared_inside(monitor, net, x, x_perturbed):
    with monitor.clean():
        monitor.compare(x, x_perturbed)


def nothing_ran(monitor, net, x, x_perturbed):
    with monitor.clean():
        pass


def perturbed_first(monitor, net, x, x_perturbed):
    with monitor.perturbed():
        pass


def perturbed_twice(monitor, net, x, x_perturbed):
    run_pair(monitor, net, x, x_perturbed)
    perturbed_first(monitor, net, x, x_perturbed)


def without_hooks(monitor, net, x, x_perturbed):
    monitor.remove_hooks()
    monitor.compare(x, x_perturbed)


def replica(monitor, net, x, x_perturbed):
    with monitor.clean():
        net[2]._replicate_for_data_parallel()(x)


def exchanged(monitor, net, x, x_perturbed):
    net[2] = neuron.IFNode(step_mode="m")
    monitor.compare(x, x_perturbed)


def last_not_followed(monitor, net, x, x_perturbed):
    monitor = MPPDMonitor(net, layers=["2", "4"])
    run_pair(monitor, net, x, x_perturbed)
    assert monitor.loss("all").requires_grad
    monitor.loss("last")


def changed_spikes(monitor, net, x, x_perturbed):
    monitor = MPPDMonitor(net, layers=["2"], spikes=True)
    net[2].register_forward_hook(lambda module, inputs, output: output.mul_(2))
    with torch.no_grad():
        run_pair(monitor, net, x, x_perturbed)
    monitor.loss(["2"], indicator="std")


MISTAKES = [
    (lambda monitor, net, x, y: monitor.compare(x, y[:, :2]), ValueError, "same shape"),
    (lambda monitor, net, x, y: run_pair(monitor, net, x, y[:, :2]), ValueError, "clean run"),
    (lambda monitor, net, x, y: run_pair(monitor, net, x, y[:3]), ValueError, "clean run"),
    (lambda monitor, net, x, y: run_pair(monitor, net, x[:3], y), ValueError, "clean run"),
    (lambda monitor, *_: monitor.loss(), RuntimeError, "two complete runs"),
    (lambda monitor, _, *x: copy.deepcopy(monitor).compare(*x), RuntimeError, "is a copy"),
    (shorter, ValueError, r"T=4 .* T=2 .*clear_recorded_data"),
    (no_reset, RuntimeError, "reset_net"),
    (another_batch, (ValueError, RuntimeError), "3|2"),
    (reset_inside, RuntimeError, "reset inside one run"),
    (nested, RuntimeError, r"clean\(\) was entered inside clean\(\)"),
    (compared_inside, RuntimeError, r"inside clean\(\)"),
    (nothing_ran, RuntimeError, r"ran inside clean\(\)"),
    (perturbed_first, RuntimeError, "no clean run"),
    (perturbed_twice, RuntimeError, "no clean run"),
    (without_hooks, RuntimeError, "has no hooks"),
    (replica, RuntimeError, "DistributedDataParallel"),
    (exchanged, RuntimeError, r"\(2\); build a new one"),
    (last_not_followed, ValueError, "'8'"),
    (changed_spikes, RuntimeError, "output of layer '2' was changed in place"),
]


@pytest.mark.parametrize(("mistake", "error", "named"), MISTAKES)
@pytest.mark.parametrize("keep", ["statistics", "loss"])
def test_a_mistake_is_named_and_no_pair_stays(keep, mistake, error, named, net):
    if keep == "loss" and mistake is shorter:
        return  # nothing is summed over pairs
    monitor = MPPDMonitor(net, keep=keep)
    with pytest.raises(error, match=named):
        mistake(monitor, net, *images())
    if mistake is not perturbed_twice:
        with pytest.raises(RuntimeError, match="two complete runs"):
            monitor.loss()


@pytest.mark.parametrize("forward", [None, lambda x: x])
def test_a_network_of_which_no_neuron_can_be_followed_says_why(forward):
    _, monitor = unfollowed(neuron.KLIFNode())
    with pytest.raises(RuntimeError, match="'1'.*KLIFNode"):
        monitor.compare(*PAIR, forward=forward)


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = neuron.IFNode(step_mode="m")
        self.second = neuron.IFNode(step_mode="m")
        self.skip = True

    def forward(self, x):
        spikes = self.first(x)
        return spikes if self.skip else self.second(spikes)


class PastHooks(Skipping):
    """Its last layer runs without its hooks, as a functional forward runs it."""

    def forward(self, x):
        return self.second.multi_step_forward(self.first(x))


@pytest.mark.parametrize(("layers", "before"), [("last", 0), ("all", 1), (["first", "second"], 0)])
def test_a_layer_that_runs_past_its_hooks_is_noticed(layers, before):
    net = PastHooks()
    monitor = MPPDMonitor(net, layers=layers)
    for _ in range(before):
        net(PAIR[0])
    message = r"layer 'second' ran inside clean\(\)"
    with pytest.raises(RuntimeError, match=message), monitor.clean():
        net(PAIR[0])
    with pytest.raises(RuntimeError, match=message):
        monitor.compare(*PAIR)
    net.forward = partial(Skipping.forward, net)
    assert list(monitor.compare(*PAIR)) == ["first"]


@pytest.mark.parametrize("skip", [True, False])
def test_a_layer_in_one_of_the_runs_only(skip):
    net = Skipping()
    net.skip = skip
    monitor = MPPDMonitor(net)
    with monitor.clean():
        net(PAIR[0])
    assert monitor.execution_order == (("first",) if skip else ("first", "second"))
    functional.reset_net(net)
    net.skip = not skip
    with pytest.raises(ValueError, match="'second'"), monitor.perturbed():
        net(PAIR[1])


class Changes(nn.Module):
    """Goes on in place on what its neuron read, or on what it returned."""

    def __init__(self, of_input):
        super().__init__()
        self.sn = neuron.IFNode(step_mode="m")
        self.of_input = of_input

    def forward(self, x):
        x = x * 1.0
        out = self.sn(x)
        return out + x.add_(1.0) if self.of_input else out.add_(1.0)


def test_what_is_changed_in_place_after_the_neurons_call():
    with pytest.raises(RuntimeError, match="input of layer 'sn' was changed in place"):
        MPPDMonitor(Changes(True)).compare(*PAIR)
    net = Changes(False)
    stats = MPPDMonitor(net).compare(*PAIR)["sn"]  # does no harm
    assert_close(stats.firing_rate, net.sn(PAIR[0]).double().mean((1, 2)))


class Keeping(nn.Module):
    """A network whose currents depend on earlier calls."""

    def __init__(self):
        super().__init__()
        self.node = neuron.LIFNode(step_mode="m")
        self.seen = 0.0

    def forward(self, x_seq):
        self.seen = 0.5 * self.seen + x_seq.mean()
        return self.node(x_seq + self.seen)


def once_in_steps():
    """What a network calls its own does not keep the monitor from looking at its steps."""
    net = nn.Sequential(nn.Linear(6, 3), DLIFNode(T, step_mode="s"))
    net.resets_itself = True
    return net


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: linear_net(neuron.LIFNode()).to("meta"), "device meta"),
        (Keeping, "(seen)"),
        (once_in_steps, "forward=lambda"),
        (lambda: Shared(nn.Identity(), nn.Linear(6, 3)), ""),
    ],
)
def test_a_network_that_cannot_be_compared_is_refused(build, named):
    net = build()
    forward = in_steps(net) if isinstance(net, Shared) else None
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        MPPDMonitor(net).compare(*PAIR, forward=forward)
    assert named in str(refusal.value)
