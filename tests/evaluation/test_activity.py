"""Firing rates, silent and saturated neurons, against counts by hand on networks of every kind."""

from dataclasses import replace

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.evaluation import firing
from sj_robust.evaluation.diagnosis.activity import LayerActivity
from sj_robust.neuron import Stage, fuse

torch.set_num_threads(1)
T = 3


def network(make=lambda: neuron.LIFNode(tau=2.0, decay_input=False), step_mode="m"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            layer.Conv2d(1, 4, 3, padding=1),
            layer.BatchNorm2d(4),
            make(),
            layer.Flatten(),
            layer.Linear(4 * 36, 6),
            make(),
            layer.Linear(6, 3),
        )
    for module in (net[0], net[4]):
        module.weight.data.mul_(4.0)
    functional.set_step_mode(net, step_mode)
    return net


def images(n=5):
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def by_hand(net, x):
    """Rate, silent and saturated of the two spiking layers, from one pass layer by layer."""
    functional.set_step_mode(net, "m")
    functional.reset_net(net)
    net.eval()
    x = x.expand(T, *x.shape)
    found = []
    with torch.no_grad():
        for name, module in net.named_children():
            x = module(x)
            if name in ("2", "5"):
                spikes = x.flatten(0, 1).flatten(1)
                shares = [(spikes.sum(0) == count).float().mean() for count in (0, len(spikes))]
                found.append((float(spikes.mean()), *map(float, shares)))
    functional.reset_net(net)
    return found


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: neuron.IFNode(),
        lambda: neuron.LIFNode(tau=2.0, decay_input=False),
        lambda: neuron.ParametricLIFNode(),
        lambda: DLIFNode(T=T, tau=2.0),
        lambda: type("Own", (neuron.LIFNode,), {})(),
    ],
    ids=["IF", "LIF", "PLIF", "DLIF", "subclass"],
)
def test_equals_counts_by_hand(make, step_mode):
    net = network(make, step_mode)
    x = images()
    found = firing(SpikingClassifier(net, T=T), x)
    expected = by_hand(net, x)
    assert [entry.layer for entry in found] == ["net.2", "net.5"]
    assert {entry.neuron for entry in found} == {type(net[2]).__name__}
    for entry, shares in zip(found, expected, strict=True):
        assert (entry.rate, entry.silent, entry.saturated) == pytest.approx(shares, abs=1e-6)
    assert 0 < found[0].rate < 1
    assert 0 < found[0].silent < 1


def test_silent_and_saturated_are_told_apart():
    net = nn.Sequential(nn.Identity(), neuron.IFNode(step_mode="m"))
    current = torch.tensor([0.0, 0.6, 5.0, 5.0]).expand(T, 2, 4).clone()
    current[:, 1, 3] = 0.0  # fires always, but for one image only
    (found,) = firing(net, current)
    expected = LayerActivity(
        "1", "IFNode", rate=pytest.approx((2 + 6 + 3) / 24), silent=0.25, saturated=0.25
    )
    assert found == expected


def test_bare_wrapped_and_fused_networks_alike():
    net = network(lambda: DLIFNode(T=T, tau=2.0))
    x = images()
    plain = firing(SpikingClassifier(net, T=T), x)
    bare = firing(net, x.expand(T, *x.shape))
    found = [(entry.layer, entry.rate) for entry in plain]
    expected = [(f"net.{entry.layer}", entry.rate) for entry in bare]
    assert found == expected
    names = fuse(net).stages
    assert type(net[1]) is Stage
    joined = firing(SpikingClassifier(net, T=T), x)
    nodes = {f"net.{old[1]}": f"net.{new}.node" for new, old in names.items()}
    expected = tuple(replace(entry, layer=nodes.get(entry.layer, entry.layer)) for entry in plain)
    assert joined == expected
    assert not net[1].node._forward_hooks  # so the next forward runs in one pass again


def test_a_neuron_called_more_than_once_counts_with_all_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.sn = neuron.IFNode(step_mode="m")

        def forward(self, x):
            wide = self.sn(x)
            functional.reset_net(self.sn)
            return self.sn(torch.zeros_like(wide[..., :1]))

    (found,) = firing(Twice(), torch.full((T, 2, 3), 2.0))
    assert found.rate == pytest.approx(3 / 4)
    assert (found.silent, found.saturated) == (0.25, 0.75)


def test_what_does_not_spike_or_run_is_left_out():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = neuron.IFNode(step_mode="m")
            self.unused = neuron.IFNode(step_mode="m")

        def forward(self, x):
            return self.used(x)

    found = [entry.layer for entry in firing(Unused(), torch.ones(T, 2, 3))]
    assert found == ["used"]
    found = firing(nn.Sequential(nn.Flatten(), nn.ReLU()), images())
    assert found == ()
    if hasattr(neuron, "NonSpikingLIFNode"):
        net = nn.Sequential(nn.Identity(), neuron.NonSpikingLIFNode())
        functional.set_step_mode(net, "m")
        assert firing(net, torch.ones(T, 2, 3)) == ()
