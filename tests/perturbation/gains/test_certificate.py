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
from sj_robust.perturbation.gains import (
    INPUT,
    Bound,
    Certificate,
    certificate,
    l2_gain,
    peak_gain,
    perturbation_gains,
)
from sj_robust.proofs import no_flip_radius


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


@pytest.mark.slow
@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 10**6), T=st.integers(1, 6), size=st.floats(1e-3, 1.0))
def test_no_random_network_and_pair_exceeds_the_exact_bounds(seed, T, size):
    x = torch.rand(6, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    found = perturbation_gains(small(T, seed=seed), x, T, x_perturbed=x + size * noise)
    assert found.holds is True
    assert [entry.name for entry in found.layers] == ["2", "5", "8", "10"]
    assert [entry.feeds for entry in found.layers] == [(INPUT,), ("2",), ("5",), ("8",)]
    for entry in found.layers:
        assert entry.not_covered is None
        if entry.measured_l2 is not None:
            assert entry.measured_peak <= entry.measured_l2 <= entry.l2.value * 1.001
            assert entry.measured_peak <= entry.peak.value * 1.001
        assert entry.any_time.value is None or entry.l2.value <= entry.any_time.value * (1 + 1e-9)


def test_values_of_a_layer_by_hand():
    T = 4
    net = small(T)
    with torch.no_grad():
        net[2].input_gain[1] = -4.0
    x, noise = torch.rand(5, 2, 6, 6), 0.3 * torch.randn(5, 2, 6, 6)
    with MPPDMonitor(net, keep="trace") as monitor:
        monitor.compare(x.expand(T, *x.shape), (x + noise).expand(T, *x.shape))
        trace = {name: monitor[name][0] for name in ("2", "5")}
    found = perturbation_gains(net, x, T, x_perturbed=x + noise)
    moved = trace["2"].spike_seq - trace["2"].spike_seq_perturbed
    ds = {
        INPUT: (T * noise.double().square().sum((1, 2, 3))).sqrt(),
        "2": moved.double().square().sum((0, 2, 3, 4)).sqrt(),
    }
    for name, feed in (("2", INPUT), ("5", "2")):
        eps = trace[name].eps.double().flatten(2).norm(dim=2)
        entry = found[name]
        assert entry.measured_l2 == pytest.approx(
            float((eps.norm(dim=0) / ds[feed]).max()), rel=1e-4
        )
        assert entry.measured_peak == pytest.approx(float((eps.amax(0) / ds[feed]).max()), rel=1e-4)
    first, second = found["2"], found["5"]
    p = net[2].input_gain.detach()
    assert first.input_gain == pytest.approx(p.tolist())
    assert (second.decay, second.input_gain, second.neuron) == (0.5, (0.5,) * T, "LIFNode")
    assert first.l2.value == pytest.approx(float(l2_gain(0.8, T, p)) * first.norm)
    assert first.peak.value == pytest.approx(float(peak_gain(0.8, T, p)) * first.norm)
    assert first.any_time.value == pytest.approx(5 * float(p.abs().max()) * first.norm)
    assert first.printed.value == first.printed_peak.value == pytest.approx(5**0.5 * first.norm)
    assert found["8"].any_time.value is None, "IF has no leak"
    assert found["8"].printed.value is None


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


def test_the_printed_constant_is_exceeded_where_the_exact_bound_holds():
    found = perturbation_gains(one_synapse(), torch.ones(1, 1), 3, x_perturbed=torch.zeros(1, 1))
    entry = found["3"]
    assert entry.norm == pytest.approx(1.0)
    assert entry.measured_l2 == pytest.approx(1.4506, abs=1e-4)
    assert entry.printed == Bound(pytest.approx(1.4142, abs=1e-4), False)
    assert entry.l2 == Bound(pytest.approx(1.4670, abs=1e-4), True)
    assert entry.printed_peak.held
    assert found.holds, "the printed constant does not count"
    assert "1.414 !" in found.table()
    assert "1.467 !" not in found.table()
    assert "not a valid L2-to-L2 bound in general" in found.table()


class Sum(nn.Module):
    """Two layers whose spikes the third one adds."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (neuron.IFNode(step_mode="m") for _ in range(3))

    def forward(self, x):
        spikes = self.first(x)
        return self.third(spikes + self.second(2.0 * spikes))


def test_the_spikes_of_all_feeding_layers_count():
    found = perturbation_gains(Sum(), torch.ones(1, 1), 1, x_perturbed=torch.zeros(1, 1))["third"]
    assert found.feeds == ("first", "second")
    assert found.norm == pytest.approx(2**0.5)
    assert found.measured_l2 == pytest.approx(2**0.5), (
        "a current of 2 from two spikes, the worst case"
    )
    assert found.holds


def test_an_exceeded_bound_is_seen():
    """A neuron whose current is not what the map of one step says: the certificate must not hold by
    construction.
    """

    class Doubles(nn.Module):
        """Twice the map when there is more than one sample, which the search for the norm never
        sees.
        """

        def forward(self, x_seq):
            return x_seq * (20.0 if x_seq.shape[1] > 1 else 1.0)

    net = one_synapse()
    net[2] = nn.Sequential(Doubles(), net[2])
    found = perturbation_gains(net, torch.ones(1, 1), 3, x_perturbed=torch.zeros(1, 1))
    assert found.holds is False
    assert found["3"].l2.held is False
    assert found["3"].peak.held is False
    assert found["1"].holds
    assert "AN EXACT BOUND WAS EXCEEDED" in found.table()


def test_classifiers_of_every_kind():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    y = (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
    spec = NetworkSpec(
        image_shape=(3, 8, 8), classes=3, T=3, channels=(4, 4), mean=(0.5,) * 3, std=(0.25,) * 3
    )
    direct = build_classifier(spec)
    found = perturbation_gains(direct, x, x_perturbed=y)
    assert found.T == 3
    assert found.holds
    eps = 0.0
    with MPPDMonitor(direct, keep="trace") as monitor:
        monitor.compare(x, y)
        eps = monitor["net.stages.0.node"][0].eps.double().square().sum((0, 2, 3, 4)).sqrt()
    ratio = eps / (3**0.5 * ((x - y) / 0.25).double().flatten(1).norm(dim=1))
    first = found.layers[0]
    assert first.measured_l2 == pytest.approx(float(ratio.max()), rel=1e-4), (
        "of the normalised input, repeated T times"
    )

    functional.set_step_mode(direct, "s")
    single = perturbation_gains(
        SpikingClassifier(direct.net, 3, mean=(0.5,) * 3, std=(0.25,) * 3), x, x_perturbed=y
    )
    for a, b in zip(single.layers, found.layers, strict=True):
        assert a.measured_l2 == pytest.approx(b.measured_l2, rel=1e-4)
    functional.set_step_mode(direct, "m")

    encoded = SpikingClassifier(direct.net, 3, PoissonEncoder(torch.Generator().manual_seed(0)))
    assert perturbation_gains(encoded, x, x_perturbed=y).holds
    frames = torch.rand(2, 5, 2, 6, 6).round()
    events = perturbation_gains(
        SpikingEventClassifier(small(5), T=5), frames, x_perturbed=1 - frames
    )
    assert events.holds
    assert events.T == 5
    features = nn.Sequential(layer.Linear(4, 6), neuron.IFNode(), layer.Linear(6, 2))
    functional.set_step_mode(features, "m")
    assert (
        perturbation_gains(features, torch.rand(3, 4), 2, x_perturbed=torch.rand(3, 4))[
            "1"
        ].measured_l2
        > 0
    )


class Partly(nn.Module):
    """One layer behind a product, one whose neuron is not known, one that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.silent, self.third = (
            neuron.IFNode(),
            neuron.IFNode(),
            neuron.IFNode(),
            None,
        )
        self.qif = neuron.QIFNode()
        self.linear = layer.Linear(4, 4)
        functional.set_step_mode(self, "m")

    def forward(self, x):
        spikes = self.first(x)
        product = self.second(self.linear(spikes) * spikes)
        return self.qif(self.linear(product)) + self.silent(self.linear(spikes * 0.0) + 0.0 * x)


def test_what_is_not_covered_is_said():
    found = perturbation_gains(Partly(), torch.ones(2, 4), 2, x_perturbed=torch.zeros(2, 4))
    assert found["first"].holds
    assert found["second"].norm is None
    assert found["second"].holds is None
    assert "operation mul" in found["second"].not_covered
    assert found["qif"].not_covered.startswith("the decay of QIFNode is not known")
    assert (found["silent"].norm, found["silent"].measured_l2) == (0.0, 0.0)
    text = found.table()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.count(" | ") for line in table] == [10] * (
        2 + 4
    )  # a head, a rule and a row per layer
    assert "second is not covered: not affine in first" in text
    assert "2 of 4 layers covered, 2 measured on 2 pairs: every exact bound held" in text
    assert certificate.SCOPE in text
    assert "no finite gain" in text
    assert "do not compose" in text
    with pytest.raises(
        KeyError, match="no layer 'nothing'; the certificate has first, second, qif, silent"
    ):
        found["nothing"]


def test_equal_pairs_measure_nothing_but_the_radius_in_which_no_spike_flips():
    x = torch.rand(3, 2, 6, 6)
    found = perturbation_gains(small(2), x, 2, x_perturbed=x)
    assert found.holds is None
    assert [entry.measured_l2 for entry in found.layers] == [None] * 4
    assert "4 of 4 layers covered, 0 measured on 3 pairs." in found.table()
    assert perturbation_gains(small(2), x, 2) == replace(found, samples=0, no_flip=())
    radii = no_flip_radius(SpikingClassifier(small(2), 2), x)
    assert found.no_flip == tuple(radii.tolist())
    assert (
        f"flips within an L2 distance of {radii.median():.1e} (median), {radii.min():.1e} (least)."
        in found.table()
    )
    beyond = perturbation_gains(small(2), 2 + x, 2, x_perturbed=x)
    assert beyond.no_flip == ()
    assert "no spike flips is not known: x must lie in [0, 1]" in beyond.table()
    content = json.loads(found.to_json())
    del (
        content["no_flip"],
        content["no_flip_unknown"],
    )  # as files were before there was such a radius
    assert Certificate.from_json(json.dumps(content)) == replace(found, no_flip=())


def test_a_norm_whose_iteration_stopped_early_counts_with_its_residual():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(200, 200), neuron.IFNode(step_mode="m"))
    worst = torch.linalg.svd(net[0].weight.detach())[2][:1]
    found = perturbation_gains(net, torch.zeros(1, 200), 1, x_perturbed=worst, max_iterations=2)
    entry = found["1"]
    assert entry.residual > 0.1 * entry.norm
    assert entry.measured_l2 > entry.l2.value * (1 + found.margin)
    assert found.holds
    assert f"a residual of at most {entry.residual / entry.norm:.1e}" in found.table()


def test_layers_used_twice_or_step_by_step():
    torch.manual_seed(0)
    x = torch.rand(4, 5)
    shared = neuron.IFNode(step_mode="m")
    found = perturbation_gains(
        nn.Sequential(nn.Linear(5, 5), shared, nn.Linear(5, 5), shared), x, 4, x_perturbed=1 - x
    )
    assert [entry.name for entry in found.layers] == ["1"]
    assert "called 2 times" in found["1"].not_covered
    net = nn.Sequential(
        nn.Linear(5, 6), neuron.IFNode(step_mode="m"), nn.Linear(6, 3), neuron.IFNode(step_mode="m")
    )
    wanted = perturbation_gains(net, x, 4, x_perturbed=1 - x)
    functional.set_step_mode(net, "s")
    contained = SpikingClassifier(nn.Sequential(nn.Sequential(), layer.MultiStepContainer(net)), 4)
    for entry, other in zip(
        perturbation_gains(contained, x, x_perturbed=1 - x).layers, wanted.layers, strict=True
    ):
        assert entry.name == f"1.0.{other.name}"
        assert entry.l2.value == pytest.approx(other.l2.value, rel=1e-4)
        assert entry.measured_l2 == pytest.approx(other.measured_l2, rel=1e-4)


def test_wrong_use():
    x = torch.rand(3, 2, 6, 6)
    for arguments, x_perturbed, message in (
        ((small(2), x[:0], 2), None, "must hold a sample"),
        ((small(2), x, 2), x / 0.0, "must be finite"),
        ((small(2), x), None, "T must be given for a bare network"),
        (
            (SpikingClassifier(small(2), 2), x, 3),
            None,
            "T must be the classifier's 2 or None, got 3",
        ),
        ((small(2), x, 2), x[:1], "must have the same shape"),
    ):
        with pytest.raises(ValueError, match=message):
            perturbation_gains(*arguments, x_perturbed=x_perturbed)


def test_saved_and_loaded_is_equal(tmp_path):
    for found in (
        perturbation_gains(small(2), torch.rand(3, 2, 6, 6), 2, x_perturbed=torch.rand(3, 2, 6, 6)),
        perturbation_gains(Partly(), torch.ones(2, 4), 2),
    ):
        found.save(tmp_path / "certificate.json")
        assert Certificate.load(tmp_path / "certificate.json") == found
    content = json.loads(found.to_json())
    assert content["scope"] == certificate.SCOPE
    assert "not a valid L2-to-L2 bound" in content["printed_is"]
    del content["layers"][0]["norm"], content["margin"]
    with pytest.raises(ValueError, match="missing or unknown"):
        Certificate.from_json(json.dumps(content))
    with pytest.raises(ValueError, match="not a stability certificate"):
        Certificate.from_json("{}")


@pytest.mark.slow
def test_plot(tmp_path):
    found = perturbation_gains(
        small(2), torch.rand(3, 2, 6, 6), 2, x_perturbed=torch.rand(3, 2, 6, 6)
    )
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")):
        found.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    perturbation_gains(small(2), torch.rand(1, 2, 6, 6), 2).plot(tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    nothing = replace(found, layers=(found.layers[0].__class__("x", "IFNode", not_covered="why"),))
    with pytest.raises(ValueError, match="no layer of the certificate is covered"):
        nothing.plot()


def test_plot_shows_every_value_of_every_layer():
    found = perturbation_gains(
        small(2), torch.rand(3, 2, 6, 6), 2, x_perturbed=torch.rand(3, 2, 6, 6)
    )
    names = [
        ["measured_l2", "l2", "any_time", "printed"],
        ["measured_peak", "peak", "printed_peak"],
    ]
    for axis, of_panel in zip(found.plot().axes, names, strict=True):
        (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
        for line, name in zip(axis.lines, of_panel, strict=True):
            entries = [getattr(layer, name) for layer in found.layers]
            values = [entry.value if isinstance(entry, Bound) else entry for entry in entries]
            shown = {row: value for row, value in enumerate(values) if value}
            assert shown, name
            assert dict(zip(line.get_ydata(), line.get_xdata(), strict=True)) == shown
            assert all(left < value < right and top < row < bottom for row, value in shown.items())
    first = found.plot().axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == [
        layer.name for layer in found.layers
    ]
