"""The correlation of indicators with size and error, against sums, pairs and loops written out
here.
"""

import copy
import functools
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from perturbation.by_hand import eps_by_hand
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score
from spikingjelly.activation_based import layer
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.defences import NoisyLIFNode
from sj_robust.perturbation import MPPDMonitor
from sj_robust.perturbation.association import auroc, pearson, ranks, spearman
from sj_robust.perturbation.indicators import INDICATORS, neuron_indicators, over_neurons
from sj_robust.perturbation.intensity import IntensityCorrelation, intensity_correlation

SIZES = [0.05, 0.2, 0.6]
assert_near = functools.partial(assert_allclose, rtol=1e-4, atol=1e-6)


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Flatten(2),
        nn.Linear(9, 12),
        DLIFNode(T=5),
        nn.Linear(12, 6),
        DLIFNode(T=5),
        nn.Linear(6, 3),
    )
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(2.0)
            if isinstance(module, DLIFNode):
                module.input_gain.copy_(torch.linspace(0.5, 1.5, 5))
    return SpikingClassifier(net, T=5).eval()


def noise(x, y, eps):
    generator = torch.Generator().manual_seed(7)
    draws = torch.randn(x.shape, generator=generator)
    return x + eps * draws


def darker(x, y, eps):
    return x - eps


def unchanged(x, y, eps):
    return x


def classified(model, size):
    """Images and what the network says that they are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(size, 1, 3, 3, generator=generator)
    with torch.no_grad():
        return x, model(x).argmax(1)


def study(**options):
    model = network()
    x, y = classified(model, 20)
    given = {
        "perturb": {"noise": noise, "darker": darker},
        "eps": SIZES,
        "resamples": 20,
    }
    return intensity_correlation(model, x, y, **given | options)


@functools.cache
def usual():
    """The study of the defaults, which several tests look at."""
    return study()


def statistic(correlation, first, second):
    """A correlation of scipy."""
    return pytest.approx(correlation(first, second).statistic, abs=1e-9)


def mean_over_rows(rows, other):
    """Mean of scipy's rank correlation of every row; 0 where a row does not vary."""
    found = np.zeros(len(rows))
    for i, row in enumerate(rows):
        if np.ptp(row):
            found[i] = spearmanr(row, other).statistic
    return found.mean()


def share_of_won_pairs(scores, positive):
    """How often a positive scores higher than a negative of its stratum, ties counting a half."""
    won = 0.0
    pairs = 0
    for of_stratum, chosen in zip(scores, positive, strict=True):
        others = of_stratum[~chosen]
        for one in of_stratum[chosen]:
            won += float((one > others).sum())
            won += 0.5 * float((one == others).sum())
            pairs += len(others)
    return won / pairs


@pytest.mark.parametrize("tied", [False, True])
def test_correlations_are_those_of_scipy(tied):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 4, 30, generator=generator).double()
    if tied:
        first = (4 * first).round()
        second = (3 * second).round()
    of_ranks = spearman(first, second)
    linear = pearson(first, second)
    for row in range(4):
        a = first[row]
        b = second[row]
        assert of_ranks[row].item() == statistic(spearmanr, a, b)
        assert linear[row].item() == statistic(pearsonr, a, b)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0, 1.0, 5.0, 5.0], [3, 1, 3, 3]),
        ([2.0, 2.0, 1.0, 1.0], [3.5, 3.5, 1.5, 1.5]),
    ],
)
def test_ties_share_their_mean_rank(values, expected):
    assert ranks(torch.tensor(values)).tolist() == expected


def test_what_does_not_vary_has_no_correlation():
    constant = torch.ones(3)
    growing = torch.arange(3)
    assert pearson(constant, growing).isnan()
    assert spearman(constant, growing).isnan()


def test_without_a_positive_there_is_no_auroc():
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert auroc(torch.rand(1, 3), nothing).isnan()


def test_auroc_counts_the_pairs_of_every_stratum():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (2, 3, 12), generator=generator).double()
    positive = torch.rand(3, 12, generator=generator) < 0.4
    found = auroc(scores, positive)
    for row, of_row in enumerate(scores):
        of_one = auroc(of_row[:1], positive[:1])
        expected = roc_auc_score(positive[0], of_row[0])
        assert of_one.item() == pytest.approx(expected)
        share = share_of_won_pairs(of_row, positive)
        assert found[row].item() == pytest.approx(share)


def test_indicators_are_the_sums_over_time_and_features():
    model = network()
    x = torch.rand(4, 1, 3, 3)
    with MPPDMonitor(model, keep="trace") as monitor:
        monitor.compare(x, noise(x, None, 0.6))
    for name in monitor.monitored_layers:
        trace = monitor[name][0]
        gains = model.get_submodule(name).input_gain.tolist()
        eps = eps_by_hand(trace.x_seq, trace.x_seq_perturbed, 0.99, gains)
        eps = eps.numpy()
        size = abs(eps)
        rate = trace.spike_seq.numpy().mean(0)
        rate_perturbed = trace.spike_seq_perturbed.numpy().mean(0)
        differ = (trace.spike_seq != trace.spike_seq_perturbed).numpy()
        assert differ.any()
        d = (trace.v_seq - trace.v_seq_perturbed).numpy()
        expected = {
            "mppd_l1": size.mean(0),
            "mppd_l2": (eps**2).mean(0),
            "mppd_max": size.max(0),
            "full": (d**2).mean(0),
            "std": differ.mean(0),
            "tasad": abs(rate - rate_perturbed),
        }
        of_neurons = neuron_indicators(trace)
        assert tuple(of_neurons) == INDICATORS
        for indicator, value in expected.items():
            whole = value.max(1) if indicator == "mppd_max" else value.mean(1)
            assert_near(of_neurons[indicator], value)
            assert_near(over_neurons(indicator, of_neurons[indicator]), whole)


class Loop:
    """The study of noise on 20 images in batches of 7, as a plain loop over the sizes."""

    def __init__(self, model):
        self.wrong = []
        self.per_step = defaultdict(list)
        self.neurons = defaultdict(list)  # indicators of single neurons [N, K] of every size
        x, y = classified(model, 20)
        with MPPDMonitor(model, keep="trace") as monitor:
            for size in SIZES:
                self.at_size(monitor, model, x, y, size)
                monitor.clear_recorded_data()

    def at_size(self, monitor, model, x, y, size):
        predicted = []
        per_step = defaultdict(float)
        for part in x.split(7):  # in the same batches, since the noise starts anew in each
            perturbed = noise(part, None, size)
            with torch.no_grad():
                predicted.append(model(perturbed).argmax(1))
            for name, stats in monitor.compare(part, perturbed).items():
                per_step[name] += len(part) / 20 * stats.ms_mppd
        wrong = torch.cat(predicted) != y
        self.wrong.append(wrong.numpy())
        for name, values in per_step.items():
            self.per_step[name].append(values.tolist())
            traces = [neuron_indicators(trace) for trace in monitor[name]]
            for indicator in INDICATORS:
                parts = [trace[indicator] for trace in traces]
                values = torch.cat(parts).double()
                self.neurons[name, indicator].append(values.numpy())


def test_study_is_the_loop_over_images_and_sizes():
    loop = Loop(network())
    result = study(batch_size=7)
    assert result.samples == 20
    assert result.left_out == 0
    assert result.eps == SIZES
    assert result.directions == ("noise", "darker")
    assert result.layers == ("net.2", "net.4")
    per_step = result.per_step["noise"]
    for name in result.layers:
        assert_allclose(per_step[name], loop.per_step[name], rtol=1e-9)
    accuracy = [1 - part.mean() for part in loop.wrong]
    assert result.accuracy["noise"] == pytest.approx(accuracy)
    assert 0 < np.mean(loop.wrong) < 1
    sizes = np.repeat(SIZES, 20)
    for (name, indicator), neurons in loop.neurons.items():
        values = np.stack(neurons)
        rows = values.max(2) if indicator == "mppd_max" else values.mean(2)
        means = result.means["noise"][name]
        assert_allclose(means[indicator], rows.mean(1), rtol=1e-5)
        expected = {
            "spearman": spearmanr(rows.ravel(), sizes).statistic,
            "pearson": pearsonr(rows.ravel(), sizes).statistic,
            "per_image": mean_over_rows(rows.T, SIZES),
            "auroc": roc_auc_score(np.ravel(loop.wrong), rows.ravel()),
            "per_neuron": mean_over_rows(np.concatenate(neurons).T, sizes),
            "auroc_same_size": share_of_won_pairs(rows, loop.wrong),
        }
        found = result.associations["noise"][name][indicator]
        for measure, value in expected.items():
            assert found[measure].value == pytest.approx(value, abs=1e-6), measure


def test_intervals_are_those_of_images_drawn_again():
    model = network()
    x, _ = classified(model, 20)
    tasad = []
    with MPPDMonitor(model, keep="trace") as monitor:
        for size in SIZES:
            monitor.compare(x, noise(x, None, size))
        for trace in monitor["net.4"]:
            per_neuron = neuron_indicators(trace)["tasad"].double()
            tasad.append(per_neuron.numpy().mean(1))
    tasad = np.stack(tasad)
    sizes = np.repeat(SIZES, 20)
    generator = torch.Generator().manual_seed(0)
    again = []
    for images in torch.randint(20, (20, 20), generator=generator):
        values = tasad[:, images].ravel()
        again.append(spearmanr(values, sizes).statistic)
    low, high = np.quantile(again, [0.025, 0.975])
    found = usual().associations["noise"]["net.4"]["tasad"]["spearman"]
    assert found.low == pytest.approx(low, abs=1e-9)
    assert found.high == pytest.approx(high, abs=1e-9)
    assert 0 < found.high - found.low < 1


def test_seed_decides_the_intervals_and_nothing_else_and_it_says_what_it_does():
    said = []
    assert study(say=said.append) == usual()
    expected = []
    for direction in usual().directions:
        expected += [f"{direction} at eps {size}: 20 images" for size in SIZES]
    assert said == [*expected, "intervals from 20 bootstrap samples"]
    other = study(seed=1)
    assert usual().associations != other.associations
    assert usual() == replace(other, associations=usual().associations)


def test_a_network_in_training_mode_is_studied_in_evaluation_mode():
    model = network()
    model.net.insert(0, layer.BatchNorm2d(1, step_mode="m"))
    model.net.insert(5, nn.Dropout(0.5))
    x, y = classified(model.eval(), 10)
    modes = []

    def watching(x, y, eps):
        modes.append(model.training)
        return darker(x, y, eps)

    options = {"perturb": {"darker": watching}, "eps": SIZES, "resamples": 2}
    wanted = intensity_correlation(model, x, y, **options)
    assert wanted.left_out == 0
    model.train()
    state = copy.deepcopy(model.state_dict())
    assert intensity_correlation(model, x, y, **options) == wanted
    assert not any(modes)
    assert model.training
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_a_network_that_draws_is_studied_with_the_draws_of_the_seed():
    net = nn.Sequential(nn.Flatten(2), NoisyLIFNode(noise_std=0.5), nn.Linear(16, 3))
    model = SpikingClassifier(net, T=2).eval()
    x = torch.rand(40, 1, 4, 4)
    y = torch.arange(40) % 3

    def found(seed):
        torch.rand(3)  # whatever else draws
        nothing = {"nothing": unchanged}
        return intensity_correlation(model, x, y, perturb=nothing, eps=[0.1, 0.2], seed=seed)

    first = found(0)
    assert found(0).accuracy == first.accuracy
    assert found(0).samples == first.samples
    assert first.means["nothing"]["net.1"]["mppd_l1"] == [0.0, 0.0]


def test_images_wrong_already_are_left_out():
    model = network()
    x, y = classified(model, 10)
    y[3] = (y[3] + 1) % 3
    options = {"perturb": {"darker": darker}, "eps": SIZES, "resamples": 2}
    result = intensity_correlation(model, x, y, **options)
    assert (result.samples, result.left_out) == (9, 1)
    others = torch.arange(10) != 3
    without = intensity_correlation(model, x[others], y[others], **options)
    assert result == replace(without, left_out=1)


def test_nobody_fooled_means_no_auroc():
    result = study(perturb={"none": unchanged}, layers=["net.2"])
    found = result.associations["none"]["net.2"]["mppd_l2"]
    assert found["auroc"].value is None
    assert found["spearman"].value is None
    assert found["spearman"].low is None
    assert found["per_image"].value == 0.0
    assert "not defined" in result.table("none")
    assert IntensityCorrelation.from_json(result.to_json()) == result


def test_round_trip_and_table():
    result = usual()
    assert IntensityCorrelation.from_json(result.to_json()) == result
    with pytest.raises(ValueError, match="not an intensity study"):
        IntensityCorrelation.from_json("{}")
