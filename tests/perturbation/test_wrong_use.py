"""Neurons that cannot be followed, and errors that say what to do."""

import contextlib
from functools import partial

import pytest
import torch
from perturbation.by_hand import Dynamics, assert_stats, captured_pair, statistics_by_hand
from perturbation.networks import Shared, T, in_steps, run_pair
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.perturbation import MPPDMonitor


class MyLIF(neuron.LIFNode):
    """It fires at half the threshold."""

    def neuronal_fire(self):
        return self.surrogate_function(self.v - self.v_threshold / 2)


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


class Halving(Leaky):
    """Its potential after a spike is nothing a BaseNode knows."""

    def potential_after(self, h, spike):
        return h - 0.5 * spike * h


def net_of(*neurons):
    torch.manual_seed(0)
    net = nn.Sequential()
    for node in neurons:
        linear = layer.Linear(6, 6)
        linear.weight.data.mul_(4)
        net.extend([linear, node])
    functional.set_step_mode(net, "m")
    return net


def inputs():
    generator = torch.Generator().manual_seed(0)
    x, x_perturbed = torch.rand(2, T, 5, 6, generator=generator)
    return x, x_perturbed


OF_ONE_RELEASE = {
    "LIAFNode": {"act": torch.relu, "threshold_related": False},
    "PSN": {"T": T},
    "GatedLIFNode": {"T": T},
    "CUBALIFNode": {},
    "ILIFNode": {},
    "ComplementaryLIFNode": {},
}
"""Neurons that one of the two releases does not have, or cannot build, and their arguments."""


def unsupported_neurons():
    found = [neuron.KLIFNode(), neuron.QIFNode(), MyLIF()]
    for name, arguments in OF_ONE_RELEASE.items():
        with contextlib.suppress(AttributeError):
            found.append(getattr(neuron, name)(**arguments))
    return found


def test_neurons_that_cannot_be_followed_are_named_in_one_warning():
    others = unsupported_neurons()
    net = nn.Sequential(neuron.LIFNode(step_mode="m"), *others)
    message = rf"does not follow {len(others)} neuron\(s\): '1': the decay of KLIF"
    with pytest.warns(UserWarning, match=message) as caught:
        monitor = MPPDMonitor(net)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert monitor.monitored_layers == ["0"]
    assert len(monitor.unsupported) == len(others)
    for name, reason in monitor.unsupported.items():
        assert type(net[int(name)]).__name__ in reason


def test_a_readout_without_spikes_is_not_the_last_spiking_layer():
    if not hasattr(neuron, "NonSpikingLIFNode"):
        pytest.skip("SpikingJelly 0.0.0.0.14 has no neuron without spikes")

    class Readout(neuron.NonSpikingLIFNode):
        pass

    net = net_of(neuron.LIFNode(), neuron.LIFNode()).append(Readout())
    with pytest.warns(UserWarning, match="emits potentials, not spikes"):
        monitor = MPPDMonitor(net)
    run_pair(monitor, net, *inputs())
    assert torch.equal(monitor.loss(), monitor.loss(["3"]))


def test_the_last_layer_is_not_guessed_when_it_cannot_be_followed():
    net = net_of(neuron.LIFNode(), neuron.KLIFNode())
    message = r"last spiking layer '3' cannot be followed .* name the layers"
    with pytest.warns(UserWarning, match="KLIFNode"):
        monitor = MPPDMonitor(net, layers="last")
    with pytest.raises(RuntimeError, match=message):
        run_pair(monitor, net, *inputs())
    with pytest.warns(UserWarning, match="KLIFNode"):
        monitor = MPPDMonitor(net, layers="all")
    run_pair(monitor, net, *inputs())
    with pytest.raises(RuntimeError, match=message):
        monitor.loss()
    assert monitor.loss(["1"]).requires_grad


@pytest.mark.parametrize("key", ["1", Leaky])
def test_a_neuron_with_a_given_decay_and_gain(key):
    net = net_of(Leaky(), neuron.IFNode())
    monitor = MPPDMonitor(net, decay={key: 0.6}, gain={key: 0.5})
    assert monitor.unsupported == {}
    stats = monitor.compare(*inputs())["1"]
    seen = captured_pair(net, ("1",), *inputs())["1"]
    assert 0 < seen.spikes.mean() < 1
    dynamics = Dynamics(decay=0.6, gain=[0.5] * T, v_reset=None)
    assert_stats(stats, statistics_by_hand(seen, dynamics))


def test_full_perturbation_is_left_out_where_the_potential_is_another():
    net = net_of(Halving(), neuron.IFNode())
    monitor = MPPDMonitor(net, decay={Halving: 0.6}, gain={Halving: 0.5})
    with pytest.warns(UserWarning, match="potential of 1 does not follow"):
        stats = monitor.compare(*inputs())
    assert stats["1"].full_ms_mppd is None
    assert stats["1"].to_dict()["summary"]["full_l1"] is None
    assert "full" not in repr(stats["1"])
    assert stats["1"].ms_mppd.sum() > 0
    assert stats["3"].full_ms_mppd is not None
    monitor.compare(*inputs())  # warns once


def test_a_decay_alone_does_not_make_a_parallel_neuron_followable():
    if not hasattr(neuron, "PSN"):
        pytest.skip("SpikingJelly 0.0.0.0.14 has no PSN")
    with pytest.raises(ValueError, match="no membrane potential that decays"):
        MPPDMonitor(net_of(neuron.PSN(T=T)), decay={neuron.PSN: 0.5})


@pytest.mark.parametrize(("samples", "wrong"), [(5, 0), (T, 1)])
def test_a_neuron_left_in_single_steps_is_named(samples, wrong):
    nodes = [neuron.IFNode(), neuron.IFNode()]
    net = net_of(*nodes)
    nodes[wrong].step_mode = "s"
    x = torch.rand(T, samples, 6)
    message = rf"^{2 * wrong + 1} in step mode 's' took other numbers of time steps .*set_step_mode"
    with MPPDMonitor(net) as monitor:
        with pytest.raises(ValueError, match=message):
            monitor.compare(x, x + 0.1)
        assert len(monitor.compare(x, x + 0.1, forward=net)) == 2


@pytest.mark.parametrize("keep", ["statistics", "loss"])
def test_runs_of_different_shapes_and_lengths(net, pair, keep):
    x, x_perturbed = pair
    monitor = MPPDMonitor(net, keep=keep)
    fewer = x_perturbed[:, :2]
    message = r"same shape, got \(4, 3, 2, 6, 6\) and \(4, 2, 2, 6, 6\)"
    with pytest.raises(ValueError, match=message):
        monitor.compare(x, fewer)
    for other in (fewer, torch.cat((x, x)), x_perturbed[:3]):
        with pytest.raises(ValueError, match="clean run"):
            run_pair(monitor, net, x, other)
        with pytest.raises(RuntimeError, match="two complete runs"):
            monitor.loss()
    functional.reset_net(net)
    message = r"batch of 3: paired\(\) needs an even batch"
    with pytest.raises(ValueError, match=message), monitor.paired():
        net(x)


def test_pairs_of_different_length_need_cleared_statistics(net, pair, monitor):
    monitor.compare(*pair)
    shorter = [x[:2] for x in pair]
    message = r"T=4 .* but this pair has T=2 .* clear_recorded_data\(\)"
    with pytest.raises(ValueError, match=message):
        run_pair(monitor, net, *shorter)
    with pytest.raises(RuntimeError, match="two complete runs"):
        monitor.loss()
    assert monitor.statistics()["2"].samples == 3
    monitor.clear_recorded_data()
    assert monitor.compare(*shorter)["2"].T == 2


def test_forgotten_reset(net, pair, monitor):
    x, x_perturbed = pair
    with monitor.clean():
        net(x)
    message = r"a different state than the clean run: call functional.reset_net"
    with pytest.raises(RuntimeError, match=message), monitor.perturbed():
        net(x_perturbed)
    both = torch.cat((x, x_perturbed), 1)
    functional.reset_net(net)
    net(both)
    message = "different states in the clean and the perturbed half"
    with pytest.raises(RuntimeError, match=message), monitor.paired():
        net(both)
    functional.reset_net(net)
    net(x)
    with pytest.raises((ValueError, RuntimeError)), monitor.clean():
        net(x[:, :2])


def test_reset_inside_a_run(net):
    classifier = SpikingClassifier(net, T=T)
    monitor = MPPDMonitor(classifier)
    with pytest.raises(RuntimeError, match="was reset inside one run"), monitor.clean():
        in_steps(classifier)(torch.rand(2, 2, 2, 6, 6))


def test_contexts_in_the_wrong_order(net, pair, monitor):
    with pytest.raises(RuntimeError, match="two complete runs"):
        monitor.loss()
    with pytest.raises(RuntimeError, match="no clean run"), monitor.perturbed():
        pass
    message = r"clean\(\) was entered inside clean\(\)"
    with pytest.raises(RuntimeError, match=message), monitor.clean(), monitor.clean():
        pass
    message = r"compare\(\) was called inside paired\(\)"
    with pytest.raises(RuntimeError, match=message), monitor.paired():
        monitor.compare(*pair)
    message = r"no followed layer ran inside clean\(\)"
    with pytest.raises(RuntimeError, match=message), monitor.clean():
        pass
    run_pair(monitor, net, *pair)
    with pytest.raises(RuntimeError, match="no clean run"), monitor.perturbed():
        pass
    monitor.compare(*pair)
    with pytest.raises(RuntimeError, match="two complete runs"):
        monitor.loss()
    monitor.remove_hooks()
    with pytest.raises(RuntimeError, match="has no hooks"):
        monitor.compare(*pair)


def test_a_network_of_which_no_neuron_can_be_followed_says_why():
    net = nn.Sequential(nn.Linear(3, 2), neuron.KLIFNode(step_mode="m"))
    with pytest.warns(UserWarning, match="does not follow 1 neuron"):
        monitor = MPPDMonitor(net)
    x = torch.rand(4, 2, 3)
    for forward in (None, net):
        with pytest.raises(RuntimeError, match="'1': the decay of KLIFNode is not known"):
            monitor.compare(x, x, forward=forward)


def test_the_last_layer_must_be_in_the_pair(net, pair):
    monitor = MPPDMonitor(net, layers=["2", "4"])
    run_pair(monitor, net, *pair)
    with pytest.raises(ValueError, match="'8'"):
        monitor.loss("last")
    assert monitor.loss("all").requires_grad


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
    x, x_perturbed = inputs()
    for _ in range(before):
        net(x)
    message = r"layer 'second' ran inside clean\(\), but was called in a way that skips hooks"
    with pytest.raises(RuntimeError, match=message), monitor.clean():
        net(x)
    with pytest.raises(RuntimeError, match=message):
        monitor.compare(x, x_perturbed)
    net.forward = partial(Skipping.forward, net)
    assert list(monitor.compare(x, x_perturbed)) == ["first"]


@pytest.mark.parametrize("skip", [True, False])
def test_a_layer_in_one_of_the_runs_only(skip):
    net = Skipping()
    net.skip = skip
    monitor = MPPDMonitor(net)
    x, x_perturbed = inputs()
    with monitor.clean():
        net(x)
    assert monitor.execution_order == (("first",) if skip else ("first", "second"))
    functional.reset_net(net)
    net.skip = not skip
    with pytest.raises(ValueError, match="'second'"), monitor.perturbed():
        net(x_perturbed)


class ChangesInput(nn.Module):
    """Goes on in place on what its neuron read."""

    def __init__(self):
        super().__init__()
        self.sn = neuron.IFNode(step_mode="m")

    def forward(self, x):
        x = x * 1.0
        out = self.sn(x)
        return out + x.add_(1.0)


class ChangesSpikes(ChangesInput):
    """Goes on in place on what its neuron returned."""

    def forward(self, x):
        out = self.sn(x)
        return out.add_(1.0)


def test_what_is_changed_in_place_after_the_neurons_call():
    with pytest.raises(RuntimeError, match="input of layer 'sn' was changed in place"):
        MPPDMonitor(ChangesInput()).compare(*inputs())
    net = ChangesSpikes()
    x, x_perturbed = inputs()
    stats = MPPDMonitor(net).compare(x, x_perturbed)["sn"]  # does no harm
    spikes = net.sn(x).double()
    assert_close(stats.firing_rate, spikes.mean((1, 2)))


def test_data_parallel_is_refused(net, pair, monitor):
    replica = net[2]._replicate_for_data_parallel()
    message = r"use torch\.nn\.parallel\.DistributedDataParallel"
    with pytest.raises(RuntimeError, match=message), monitor.clean():
        replica(pair[0])


def test_one_neuron_for_layers_of_different_size():
    net = Shared(nn.Identity(), nn.Linear(6, 3))
    with pytest.raises((ValueError, RuntimeError)):
        MPPDMonitor(net).compare(*inputs(), forward=in_steps(net))


class Keeping(nn.Module):
    """A network whose currents depend on earlier calls."""

    def __init__(self):
        super().__init__()
        self.node = neuron.LIFNode(step_mode="m")
        self.seen = 0.0

    def forward(self, x_seq):
        self.seen = 0.5 * self.seen + x_seq.mean()
        return self.node(x_seq + self.seen)


def test_a_network_without_values_or_with_a_state_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"weight on the device meta"):
        MPPDMonitor(net_of(neuron.LIFNode()).to("meta")).compare(*inputs())
    with pytest.raises(ValueError, match=r"keeps a state that .* \(seen\)"):
        MPPDMonitor(Keeping()).compare(*inputs())
