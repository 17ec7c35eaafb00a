"""The correlation of indicators with size and error, against scipy, pairs and loops written out
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
from sj_robust.perturbation.intensity import (
    IntensityCorrelation,
    intensity_correlation,
    neuron_indicators,
)

SIZES = [0.05, 0.2, 0.6]


@functools.cache
def network():
    torch.manual_seed(0)
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
    return x + eps * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))


def darker(x, y, eps):
    return x - eps


def unchanged(x, y, eps):
    return x


def classified(model):
    """Images and what the network says that they are."""
    x = torch.rand(20, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, model(x).argmax(1)


def study(model=None, x=None, y=None, **options):
    given = {"perturb": {"noise": noise, "darker": darker}, "eps": SIZES, "resamples": 20}
    model = model or network()
    if x is None:
        x, classes = classified(model)
        y = classes if y is None else y
    return intensity_correlation(model, x, y, **given | options)


@functools.cache
def usual():
    """The study of the defaults, which several tests look at."""
    return study(batch_size=7)


def indicators_by_hand(model, name, trace):
    """Every indicator of single neurons [N, K]."""
    gains = model.get_submodule(name).input_gain.tolist()
    eps = eps_by_hand(trace.x_seq, trace.x_seq_perturbed, 0.99, gains).numpy()
    spikes, spikes_perturbed = trace.spike_seq.numpy(), trace.spike_seq_perturbed.numpy()
    return {
        "mppd_l1": abs(eps).mean(0),
        "mppd_l2": (eps**2).mean(0),
        "mppd_max": abs(eps).max(0),
        "full": ((trace.v_seq - trace.v_seq_perturbed).double().numpy() ** 2).mean(0),
        "std": (spikes != spikes_perturbed).mean(0),
        "tasad": abs(spikes.mean(0, dtype=float) - spikes_perturbed.mean(0, dtype=float)),
    }


@functools.cache
def loop():
    """The study of noise on 20 images in batches of 7, as a plain loop over the sizes: who is
    wrong, MS-MPPD per step, and the indicators of single neurons [N, K] of every size.
    """
    model = network()
    x, y = classified(model)
    wrong, per_step, neurons = [], defaultdict(list), defaultdict(list)
    for size in SIZES:
        parts, sums, predicted = defaultdict(list), defaultdict(float), []
        for part in x.split(7):  # in the same batches, since the noise starts anew in each
            perturbed = noise(part, None, size)
            with torch.no_grad():
                predicted.append(model(perturbed).argmax(1))
            with MPPDMonitor(model, keep="trace") as monitor:
                for name, stats in monitor.compare(part, perturbed).items():
                    sums[name] += len(part) / 20 * stats.ms_mppd.numpy()
                    by_hand = indicators_by_hand(model, name, monitor[name][0])
                    found = neuron_indicators(monitor[name][0])
                    assert tuple(found) == tuple(by_hand)
                    for indicator, value in found.items():
                        assert_allclose(value, by_hand[indicator], rtol=1e-4, atol=1e-6)
                        parts[name, indicator].append(value.double())
        wrong.append((torch.cat(predicted) != y).numpy())
        for name, values in sums.items():
            per_step[name].append(values)
        for key, values in parts.items():
            neurons[key].append(np.concatenate(values))
    return np.stack(wrong), per_step, {key: np.stack(values) for key, values in neurons.items()}


def over_neurons(indicator, values):
    return values.max(-1) if indicator == "mppd_max" else values.mean(-1)


def mean_over_rows(rows, other):
    """Mean of scipy's rank correlation of every row; 0 where a row does not vary."""
    return np.mean([spearmanr(row, other).statistic if np.ptp(row) else 0.0 for row in rows])


def share_of_won_pairs(scores, positive):
    """How often a positive scores higher than a negative of its stratum, ties counting a half."""
    won = pairs = 0.0
    for of_stratum, chosen in zip(scores, positive, strict=True):
        differences = of_stratum[chosen][:, None] - of_stratum[~chosen][None]
        won += (differences > 0).sum() + 0.5 * (differences == 0).sum()
        pairs += differences.size
    return won / pairs


def test_study_is_the_loop_over_images_and_sizes():
    wrong, per_step, neurons = loop()
    result = usual()
    assert (result.samples, result.left_out, result.eps) == (20, 0, SIZES)
    assert result.directions == ("noise", "darker")
    assert result.layers == ("net.2", "net.4")
    for name in result.layers:
        assert_allclose(result.per_step["noise"][name], per_step[name], rtol=1e-9)
    assert result.accuracy["noise"] == pytest.approx(1 - wrong.mean(1))
    assert 0 < wrong.mean() < 1
    sizes = np.repeat(SIZES, 20)
    for (name, indicator), values in neurons.items():
        rows = over_neurons(indicator, values)
        assert_allclose(result.means["noise"][name][indicator], rows.mean(1), rtol=1e-5)
        expected = {
            "spearman": spearmanr(rows.ravel(), sizes).statistic,
            "pearson": pearsonr(rows.ravel(), sizes).statistic,
            "per_image": mean_over_rows(rows.T, SIZES),
            "auroc": roc_auc_score(wrong.ravel(), rows.ravel()),
            "per_neuron": mean_over_rows(values.reshape(60, -1).T, sizes),
            "auroc_same_size": share_of_won_pairs(rows, wrong),
        }
        found = result.associations["noise"][name][indicator]
        for measure, value in expected.items():
            assert found[measure].value == pytest.approx(value, abs=1e-6), (indicator, measure)


def test_intervals_are_those_of_images_drawn_again():
    tasad = loop()[2]["net.4", "tasad"].mean(-1)
    drawn = torch.randint(20, (20, 20), generator=torch.Generator().manual_seed(0))
    sizes = np.repeat(SIZES, 20)
    again = [spearmanr(tasad[:, images].ravel(), sizes).statistic for images in drawn]
    found = usual().associations["noise"]["net.4"]["tasad"]["spearman"]
    assert_allclose([found.low, found.high], np.quantile(again, [0.025, 0.975]), atol=1e-9)
    assert 0 < found.high - found.low < 1


def test_seed_decides_the_intervals_and_nothing_else():
    other = study(seed=1, batch_size=7)
    assert usual().associations != other.associations
    assert usual() == replace(other, associations=usual().associations)


def test_a_network_in_training_mode_is_studied_in_evaluation_mode():
    model = copy.deepcopy(network())
    model.net.insert(0, layer.BatchNorm2d(1, step_mode="m"))
    model.net.insert(5, nn.Dropout(0.5))
    x, y = classified(model.eval())
    modes = []

    def watching(x, y, eps):
        modes.append(model.training)
        return darker(x, y, eps)

    options = {"perturb": {"darker": watching}, "resamples": 2}
    wanted = study(model, x, y, **options)
    assert wanted.left_out == 0
    model.train()
    state = copy.deepcopy(model.state_dict())
    assert study(model, x, y, **options) == wanted
    assert not any(modes)
    assert model.training
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_a_network_that_draws_is_studied_with_the_draws_of_the_seed():
    net = nn.Sequential(nn.Flatten(2), NoisyLIFNode(noise_std=0.5), nn.Linear(9, 3))
    model = SpikingClassifier(net, T=2).eval()
    y = torch.arange(20) % 3
    results = []
    for _ in range(2):
        torch.rand(3)  # whatever else draws
        results.append(study(model, y=y, perturb={"nothing": unchanged}, resamples=2))
    assert results[0].accuracy == results[1].accuracy
    assert results[0].samples == results[1].samples
    assert results[0].means["nothing"]["net.1"]["mppd_l1"] == [0.0] * 3


def test_images_wrong_already_are_left_out():
    x, y = classified(network())
    wrong = y.clone()
    wrong[3] = (y[3] + 1) % 3
    others = torch.arange(20) != 3
    options = {"perturb": {"darker": darker}, "resamples": 2}
    result = study(y=wrong, **options)
    assert (result.samples, result.left_out) == (19, 1)
    assert result == replace(study(x=x[others], y=y[others], **options), left_out=1)


def test_nobody_fooled_means_no_auroc_and_a_study_can_be_saved():
    result = study(perturb={"none": unchanged}, layers=["net.2"])
    found = result.associations["none"]["net.2"]["mppd_l2"]
    assert found["auroc"].value is None
    assert found["spearman"].value is None
    assert found["spearman"].low is None
    assert found["per_image"].value == 0.0
    assert "not defined" in result.table("none")
    for saved in (result, usual()):
        assert IntensityCorrelation.from_json(saved.to_json()) == saved
    with pytest.raises(ValueError, match="not an intensity study"):
        IntensityCorrelation.from_json("{}")
