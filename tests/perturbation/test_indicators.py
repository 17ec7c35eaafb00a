"""Distances of spikes as a loss, against spikes captured by the test's own hooks."""

import pytest
import torch
from perturbation.networks import NEURONS, T, conv_net, images, in_steps
from spikingjelly.activation_based import functional
from torch import nn

from sj_robust.perturbation import MPPDMonitor, spike_train_distance, tasad

NAMES = ("2", "4", "8")


def spikes_of(net, x):
    """Spikes [T, N, *] with their graph, by name."""
    seen = {}
    handles = [
        net.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
        for name in NAMES
    ]
    functional.reset_net(net)
    net(x)
    functional.reset_net(net)
    for handle in handles:
        handle.remove()
    return seen


def two_runs(monitor, net, x, x_perturbed, run):
    for context, a in ((monitor.clean, x), (monitor.perturbed, x_perturbed)):
        functional.reset_net(net)
        with context():
            run(a)


def network(kind):
    net = conv_net(NEURONS[kind][0]).train()
    net[1].eval()
    return net


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("indicator", ["std", "tasad"])
@pytest.mark.parametrize("kind", ["LIF", "DLIF"])
@pytest.mark.parametrize("how", ["two runs", "steps", "paired", "no graph"])
def test_value_and_gradient_are_those_of_the_explicit_distance(kind, indicator, norm, how):
    net = network(kind)
    x, x_perturbed = images()
    clean = {name: spikes.detach() for name, spikes in spikes_of(net, x).items()}
    perturbed = spikes_of(net, x_perturbed)
    differences = [perturbed[name] - clean[name] for name in NAMES]
    if indicator == "tasad":
        differences = [difference.sum(0) / T for difference in differences]
    expected = torch.stack([(d**2 if norm == "l2" else d.abs()).mean() for d in differences]).mean()
    assert expected > 1e-3

    monitor = MPPDMonitor(net, spikes=True)
    if how == "paired":
        functional.reset_net(net)
        with monitor.paired():
            net(torch.cat((x, x_perturbed), 1))
    elif how == "no graph":
        with torch.no_grad():
            two_runs(monitor, net, x, x_perturbed, net)
    elif how == "steps":
        functional.set_step_mode(net, "s")
        two_runs(monitor, net, x, x_perturbed, in_steps(net))
    else:
        two_runs(monitor, net, x, x_perturbed, net)
    value = monitor.loss("all", norm, indicator=indicator)
    torch.testing.assert_close(value, expected.detach(), check_dtype=False, rtol=1e-5, atol=0)
    if norm == "l1":
        distance = {"std": spike_train_distance, "tasad": tasad}[indicator]
        mean = torch.stack([distance(clean[name], perturbed[name]).mean() for name in NAMES]).mean()
        torch.testing.assert_close(value, mean.detach(), check_dtype=False, rtol=1e-5, atol=0)
    if how == "no graph":
        assert not value.requires_grad
        return
    params = [value for value in net[:8].parameters() if value.ndim > 1]
    for got, wanted in zip(*(torch.autograd.grad(v, params) for v in (value, expected)), strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_wrong_use():
    net = network("LIF")
    x, x_perturbed = images()
    monitor = MPPDMonitor(net)
    two_runs(monitor, net, x, x_perturbed, net)
    with pytest.raises(ValueError, match="needs the spikes: build the monitor with spikes=True"):
        monitor.loss(indicator="std")
    with pytest.raises(ValueError, match=r"indicator must be one of .*'mppd', .*got 'rate'"):
        monitor.loss(indicator="rate")


class Doubling(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def test_spikes_changed_in_place_are_refused():
    net = network("LIF")
    x, x_perturbed = images()
    monitor = MPPDMonitor(net, layers=["2"], spikes=True)
    net[2].register_forward_hook(lambda m, args, out: Doubling()(out))
    with torch.no_grad():
        two_runs(monitor, net, x, x_perturbed, net)
        with pytest.raises(RuntimeError, match="output of layer '2' was changed in place"):
            monitor.loss(["2"], indicator="std")
