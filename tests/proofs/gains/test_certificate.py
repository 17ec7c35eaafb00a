"""Certificates hold on random networks and pairs, are checked by hand, and say what they do not
cover.
"""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.classifier import PoissonEncoder, SpikingEventClassifier
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.perturbation import MPPDMonitor
from sj_robust.proofs import no_flip_radius
from sj_robust.proofs.gains import (
    Certificate,
    certificate,
    l2_gain,
    peak_gain,
    perturbation_gains,
)
from sj_robust.proofs.gains.certificate import Bound
from sj_robust.proofs.gains.operator import INPUT


def small(T, step_mode="m", seed=0):
    """DLIF with random gains, LIF with decay_input, IF and PLIF, one after the other."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        layer.BatchNorm2d(4),
        DLIFNode(T, tau=5.0),
        layer.AvgPool2d(2),
        layer.Conv2d(4, 4, 3, padding=1),
        neuron.LIFNode(tau=2.0),
        layer.Flatten(),
        layer.Linear(4 * 3 * 3, 12),
        neuron.IFNode(),
        layer.Linear(12, 12),
        neuron.ParametricLIFNode(),
        layer.Linear(12, 3),
    )
    net[1].running_var.uniform_(0.01, 0.2)
    with torch.no_grad():
        net[2].input_gain.normal_(1.0, 1.0)
        for module in net[4:]:
            if hasattr(module, "weight"):
                module.weight.mul_(3.0)
    functional.set_step_mode(net, step_mode)
    return net


def images():
    """Three of them, as ``small`` takes them."""
    return torch.rand(3, 2, 6, 6)


@pytest.mark.slow
@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 10**6), T=st.integers(1, 6), size=st.floats(1e-3, 1.0))
def test_no_random_network_and_pair_exceeds_the_exact_bounds(seed, T, size):
    net = small(T, seed=seed)
    x = torch.rand(6, 2, 6, 6)
    noise = torch.randn(x.shape)
    found = perturbation_gains(net, x, T, x_perturbed=x + size * noise)
    assert found.holds is True
    feeds = {entry.name: entry.feeds for entry in found.layers}
    assert feeds == {
        "2": (INPUT,),
        "5": ("2",),
        "8": ("5",),
        "10": ("8",),
    }
    for entry in found.layers:
        assert entry.not_covered is None
        if entry.measured_l2 is not None:
            assert entry.measured_peak <= entry.measured_l2
            assert entry.measured_l2 <= entry.l2.value * 1.001
            assert entry.measured_peak <= entry.peak.value * 1.001
        if entry.any_time.value is not None:
            assert entry.l2.value <= entry.any_time.value * (1 + 1e-9)


def test_values_of_a_layer_by_hand():
    T = 4
    net = small(T)
    with torch.no_grad():
        net[2].input_gain[1] = -4.0
    x = images()
    noise = 0.3 * torch.randn(x.shape)
    x_perturbed = x + noise
    with MPPDMonitor(net, keep="trace") as monitor:
        monitor.compare(x.expand(T, *x.shape), x_perturbed.expand(T, *x.shape))
        first_trace = monitor["2"][0]
        second_trace = monitor["5"][0]
    found = perturbation_gains(net, x, T, x_perturbed=x_perturbed)
    first = found["2"]
    second = found["5"]

    moved_input = (noise * T**0.5).double().flatten(1).norm(dim=1)
    assert_measured(first, first_trace.eps, moved_input)
    moved = first_trace.spike_seq - first_trace.spike_seq_perturbed
    moved_spikes = norms_by_hand(moved).norm(dim=0)
    assert_measured(second, second_trace.eps, moved_spikes)

    p = net[2].input_gain.detach()
    gains = {
        "l2": l2_gain(0.8, T, p).item(),
        "peak": peak_gain(0.8, T, p).item(),
        "any_time": 5 * p.abs().max().item(),
        "printed": 5**0.5,
        "printed_peak": 5**0.5,
    }
    for name, gain in gains.items():
        bound = getattr(first, name)
        assert bound.value == pytest.approx(gain * first.norm), name
    assert first.input_gain == pytest.approx(p.tolist())
    assert second.decay == 0.5
    assert second.input_gain == (0.5,) * T
    assert second.neuron == "LIFNode"
    assert found["8"].any_time.value is None, "IF has no leak"
    assert found["8"].printed.value is None


def norms_by_hand(seq):
    """Norm of every step of every sample, [T, N]."""
    return seq.double().flatten(2).norm(dim=2)


def largest(eps, spikes):
    return float((eps / spikes).max())


def assert_measured(entry, eps_seq, spikes):
    eps = norms_by_hand(eps_seq)
    l2 = largest(eps.norm(dim=0), spikes)
    peak = largest(eps.amax(0), spikes)
    assert entry.measured_l2 == pytest.approx(l2, rel=1e-4)
    assert entry.measured_peak == pytest.approx(peak, rel=1e-4)


def one_synapse():
    """A spike per step of one run and none of the other reach a neuron of decay 0.5 through a
    weight of 1.
    """
    net = nn.Sequential(
        layer.Linear(1, 1, bias=False),
        neuron.IFNode(),
        layer.Linear(1, 1, bias=False),
        neuron.LIFNode(tau=2.0, decay_input=False),
    )
    for module in net[::2]:
        nn.init.ones_(module.weight)
    functional.set_step_mode(net, "m")
    return net


def gains_of_a_spike(net, T):
    """Of an input of 1 and one of 0."""
    one = torch.ones(1, 1)
    return perturbation_gains(net, one, T, x_perturbed=0 * one)


def test_the_printed_constant_is_exceeded_where_the_exact_bound_holds():
    found = gains_of_a_spike(one_synapse(), 3)
    entry = found["3"]
    assert entry.norm == pytest.approx(1.0)
    assert entry.measured_l2 == pytest.approx(1.4506, abs=1e-4)
    assert entry.printed.value == pytest.approx(1.4142, abs=1e-4)
    assert entry.printed.held is False
    assert entry.l2.value == pytest.approx(1.4670, abs=1e-4)
    assert entry.l2.held is True
    assert entry.printed_peak.held
    assert found.holds, "the printed constant does not count"
    table = found.table()
    assert "1.414 !" in table
    assert "1.467 !" not in table
    assert "not a valid L2-to-L2 bound in general" in table


class Sum(nn.Module):
    """Two layers whose spikes the third one adds."""

    def __init__(self):
        super().__init__()
        self.first = neuron.IFNode(step_mode="m")
        self.second = neuron.IFNode(step_mode="m")
        self.third = neuron.IFNode(step_mode="m")

    def forward(self, x):
        spikes = self.first(x)
        others = self.second(2.0 * spikes)
        return self.third(spikes + others)


def test_the_spikes_of_all_feeding_layers_count():
    third = gains_of_a_spike(Sum(), 1)["third"]
    assert third.feeds == ("first", "second")
    assert third.norm == pytest.approx(2**0.5)
    assert third.measured_l2 == pytest.approx(2**0.5), "a current of 2 from two spikes"
    assert third.holds


def test_an_exceeded_bound_is_seen():
    """A neuron whose current is not what the map of one step says: the certificate must not hold by
    construction.
    """

    class Doubles(nn.Module):
        """Twice the map when there is more than one sample, which the search for the norm never
        sees.
        """

        def forward(self, x_seq):
            return 20.0 * x_seq if x_seq.shape[1] > 1 else x_seq

    net = one_synapse()
    net[2] = nn.Sequential(Doubles(), net[2])
    found = gains_of_a_spike(net, 3)
    assert found.holds is False
    assert found["3"].l2.held is False
    assert found["3"].peak.held is False
    assert found["1"].holds
    assert "AN EXACT BOUND WAS EXCEEDED" in found.table()


MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)


@pytest.fixture
def direct():
    """A network that takes images."""
    torch.manual_seed(0)
    spec = NetworkSpec(
        image_shape=(3, 8, 8),
        classes=3,
        T=3,
        channels=(4, 4),
        mean=MEAN,
        std=STD,
    )
    return build_classifier(spec)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 8, 8, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    return x, (x + 0.2 * noise).clamp(0, 1)


def test_the_input_is_the_normalised_one_repeated_t_times(direct, pair):
    x, x_perturbed = pair
    found = perturbation_gains(direct, x, x_perturbed=x_perturbed)
    assert found.T == 3
    assert found.holds
    with MPPDMonitor(direct, keep="trace") as monitor:
        monitor.compare(x, x_perturbed)
        eps = norms_by_hand(monitor["net.stages.0.node"][0].eps).norm(dim=0)
    moved = ((x - x_perturbed) / 0.25).double().flatten(1).norm(dim=1)
    expected = largest(eps, 3**0.5 * moved)
    assert found.layers[0].measured_l2 == pytest.approx(expected, rel=1e-4)

    functional.set_step_mode(direct, "s")
    stepwise = SpikingClassifier(direct.net, 3, mean=MEAN, std=STD)
    single = perturbation_gains(stepwise, x, x_perturbed=x_perturbed)
    for one, other in zip(single.layers, found.layers, strict=True):
        assert one.measured_l2 == pytest.approx(other.measured_l2, rel=1e-4)


def test_a_random_encoder(direct, pair):
    x, x_perturbed = pair
    encoder = PoissonEncoder(torch.Generator().manual_seed(0))
    encoded = SpikingClassifier(direct.net, 3, encoder)
    assert perturbation_gains(encoded, x, x_perturbed=x_perturbed).holds


def test_event_frames():
    frames = torch.rand(2, 5, 2, 6, 6).round()
    model = SpikingEventClassifier(small(5), T=5)
    found = perturbation_gains(model, frames, x_perturbed=1 - frames)
    assert found.holds
    assert found.T == 5


def test_features_in_place_of_images():
    net = nn.Sequential(
        layer.Linear(4, 6),
        neuron.IFNode(),
        layer.Linear(6, 2),
    )
    functional.set_step_mode(net, "m")
    x = torch.rand(3, 4)
    found = perturbation_gains(net, x, 2, x_perturbed=1 - x)
    assert found["1"].measured_l2 > 0


class Partly(nn.Module):
    """One layer behind a product, one whose neuron is not known, one that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.first = neuron.IFNode()
        self.second = neuron.IFNode()
        self.silent = neuron.IFNode()
        self.qif = neuron.QIFNode()
        self.linear = layer.Linear(4, 4)
        functional.set_step_mode(self, "m")

    def forward(self, x):
        spikes = self.first(x)
        product = self.second(self.linear(spikes) * spikes)
        unknown = self.qif(self.linear(product))
        nothing = self.linear(spikes * 0.0) + 0.0 * x
        return unknown + self.silent(nothing)


def test_what_is_not_covered_is_said():
    found = perturbation_gains(Partly(), torch.ones(2, 4), 2, x_perturbed=torch.zeros(2, 4))
    assert found["first"].holds
    assert found["second"].norm is None
    assert found["second"].holds is None
    assert "operation mul" in found["second"].not_covered
    assert found["qif"].not_covered.startswith("the decay of QIFNode is not known")
    assert found["silent"].norm == 0.0
    assert found["silent"].measured_l2 == 0.0
    text = found.table()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 4, "a head, a rule and a row per layer"
    for row in rows:
        assert row.count(" | ") == 10
    assert "second is not covered: not affine in layer first" in text
    assert "2 of 4 layers covered, 2 measured on 2 pairs: every exact bound held" in text
    assert certificate.SCOPE in text
    assert "no finite gain" in text
    assert "do not compose" in text
    message = "no layer 'nothing'; the certificate has first, second, qif, silent"
    with pytest.raises(KeyError, match=message):
        found["nothing"]


def test_equal_pairs_measure_nothing_but_the_radius_in_which_no_spike_flips():
    x = images()
    found = perturbation_gains(small(2), x, 2, x_perturbed=x)
    assert found.holds is None
    for entry in found.layers:
        assert entry.measured_l2 is None
    table = found.table()
    assert "4 of 4 layers covered, 0 measured on 3 pairs." in table
    alone = perturbation_gains(small(2), x, 2)
    assert alone == replace(found, samples=0, no_flip=())
    radii = no_flip_radius(SpikingClassifier(small(2), 2), x)
    assert found.no_flip == tuple(radii.tolist())
    assert f"flips within an L2 distance of {radii.median():.1e} (median)" in table
    assert f"{radii.min():.1e} (least)." in table
    beyond = perturbation_gains(small(2), 2 + x, 2, x_perturbed=x)
    assert beyond.no_flip == ()
    assert "no spike flips is not known: x must lie in [0, 1]" in beyond.table()


def test_files_from_before_there_was_such_a_radius():
    x = images()
    found = perturbation_gains(small(2), x, 2, x_perturbed=x)
    content = json.loads(found.to_json())
    del content["no_flip"]
    del content["no_flip_unknown"]
    assert Certificate.from_json(json.dumps(content)) == replace(found, no_flip=())


def test_a_norm_whose_iteration_stopped_early_counts_with_its_residual():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(200, 200), neuron.IFNode(step_mode="m"))
    _, _, right = torch.linalg.svd(net[0].weight.detach())
    worst = right[:1]
    found = perturbation_gains(net, 0 * worst, 1, x_perturbed=worst, max_iterations=2)
    entry = found["1"]
    assert entry.residual > 0.1 * entry.norm
    assert entry.measured_l2 > entry.l2.value * (1 + found.margin)
    assert found.holds
    assert f"a residual of at most {entry.residual / entry.norm:.1e}" in found.table()


def test_a_layer_used_twice():
    x = torch.rand(4, 5)
    shared = neuron.IFNode(step_mode="m")
    net = nn.Sequential(
        nn.Linear(5, 5),
        shared,
        nn.Linear(5, 5),
        shared,
    )
    found = perturbation_gains(net, x, 4, x_perturbed=1 - x)
    assert [entry.name for entry in found.layers] == ["1"]
    assert "called 2 times" in found["1"].not_covered


def test_layers_that_a_container_calls_step_by_step():
    torch.manual_seed(0)
    x = torch.rand(4, 5)
    net = nn.Sequential(
        nn.Linear(5, 6),
        neuron.IFNode(),
        nn.Linear(6, 3),
        neuron.IFNode(),
    )
    functional.set_step_mode(net, "m")
    wanted = perturbation_gains(net, x, 4, x_perturbed=1 - x)
    functional.set_step_mode(net, "s")
    container = nn.Sequential(nn.Sequential(), layer.MultiStepContainer(net))
    found = perturbation_gains(SpikingClassifier(container, 4), x, x_perturbed=1 - x)
    assert len(found.layers) == len(wanted.layers) == 2
    for other in wanted.layers:
        entry = found[f"1.0.{other.name}"]
        assert entry.l2.value == pytest.approx(other.l2.value, rel=1e-4)
        assert entry.measured_l2 == pytest.approx(other.measured_l2, rel=1e-4)


@pytest.fixture
def measured():
    x = images()
    return perturbation_gains(small(2), x, 2, x_perturbed=1 - x)


def test_saved_and_loaded_is_equal(measured, tmp_path):
    partly = perturbation_gains(Partly(), torch.ones(2, 4), 2)
    for found in (measured, partly):
        found.save(tmp_path / "certificate.json")
        assert Certificate.load(tmp_path / "certificate.json") == found
    content = json.loads(measured.to_json())
    assert content["scope"] == certificate.SCOPE
    assert "not a valid L2-to-L2 bound" in content["printed_is"]
    del content["margin"]
    with pytest.raises(ValueError, match="missing or unknown"):
        Certificate.from_json(json.dumps(content))
    with pytest.raises(ValueError, match="not a stability certificate"):
        Certificate.from_json("{}")


PANELS = (
    ("measured_l2", "l2", "any_time", "printed"),
    ("measured_peak", "peak", "printed_peak"),
)


def test_plot_shows_every_value_of_every_layer(measured):
    axes = measured.plot().axes
    for axis, names in zip(axes, PANELS, strict=True):
        left, right = axis.get_xlim()
        bottom, top = axis.get_ylim()
        for line, name in zip(axis.lines, names, strict=True):
            expected = {}
            for row, one in enumerate(measured.layers):
                entry = getattr(one, name)
                value = entry.value if isinstance(entry, Bound) else entry
                if value:
                    expected[row] = value
                    assert left < value < right
                    assert top < row < bottom
            assert expected, name
            found = dict(zip(line.get_ydata(), line.get_xdata(), strict=True))
            assert found == expected
    names = [one.name for one in measured.layers]
    found = [label.get_text() for label in axes[0].get_yticklabels()]
    assert found == names
