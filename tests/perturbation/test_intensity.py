"""The correlation of indicators with size and error, against sums, pairs and loops written out
here.
"""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from perturbation.by_hand import eps_by_hand
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.perturbation import MPPDMonitor
from sj_robust.perturbation.association import auroc, pearson, ranks, spearman
from sj_robust.perturbation.indicators import INDICATORS, neuron_indicators, sample_indicators
from sj_robust.perturbation.intensity import IntensityCorrelation, intensity_correlation

SIZES = [0.05, 0.2, 0.6]


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
    return x + eps * torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)


def classified(model, size):
    """Images and what the network says that they are."""
    x = torch.rand(size, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, model(x).argmax(1)


def study(model=None, **options):
    model = network() if model is None else model
    x, y = classified(model, 20)
    given = {
        "perturb": {"noise": noise, "darker": lambda x, y, eps: x - eps},
        "eps": SIZES,
        "resamples": 20,
    } | options
    return intensity_correlation(model, x, y, **given), x, y


@functools.cache
def usual():
    """The study of the defaults, which several tests look at."""
    return study()[0]


@pytest.mark.parametrize("tied", [False, True])
def test_correlations_are_those_of_scipy(tied):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 4, 30, generator=generator, dtype=torch.float64).unbind(0)
    if tied:
        first, second = (4 * first).round(), (3 * second).round()
    for row in range(4):
        a, b = first[row].numpy(), second[row].numpy()
        assert spearman(first, second)[row].item() == pytest.approx(
            spearmanr(a, b).statistic, abs=1e-12
        )
        assert pearson(first, second)[row].item() == pytest.approx(
            pearsonr(a, b).statistic, abs=1e-12
        )


def test_ties_and_what_does_not_vary():
    tied = torch.tensor([[5.0, 1.0, 5.0, 5.0], [2.0, 2.0, 1.0, 1.0]])
    assert ranks(tied).tolist() == [[3, 1, 3, 3], [3.5, 3.5, 1.5, 1.5]]
    for correlation in (pearson, spearman):
        assert correlation(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])).isnan()
    assert auroc(torch.rand(1, 3), torch.zeros(1, 3, dtype=torch.bool)).isnan()


def test_auroc_counts_the_pairs_of_every_stratum():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (2, 3, 12), generator=generator).double()
    positive = torch.rand(3, 12, generator=generator) < 0.4
    for row in range(2):
        assert auroc(scores[row, :1], positive[:1]).item() == pytest.approx(
            roc_auc_score(positive[0].numpy(), scores[row, 0].numpy())
        )
        won = pairs = 0.0
        for stratum in range(3):
            for i in range(12):
                for j in range(12):
                    if positive[stratum, i] and not positive[stratum, j]:
                        difference = scores[row, stratum, i] - scores[row, stratum, j]
                        won += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
                        pairs += 1
        assert auroc(scores, positive)[row].item() == pytest.approx(won / pairs)


def test_indicators_are_the_sums_over_time_and_features():
    model = network()
    x = torch.rand(4, 1, 3, 3)
    with MPPDMonitor(model, keep="trace") as monitor:
        monitor.compare(x, noise(x, None, 0.6))
        for name in monitor.monitored_layers:
            trace = monitor[name][0]
            gains = model.get_submodule(name).input_gain.tolist()
            eps = eps_by_hand(trace.x_seq, trace.x_seq_perturbed, 0.99, gains).numpy()
            s, s_perturbed = trace.spike_seq.numpy(), trace.spike_seq_perturbed.numpy()
            assert (s != s_perturbed).any()
            d = trace.v_seq.numpy() - trace.v_seq_perturbed.numpy()
            expected = {
                "mppd_l1": abs(eps).mean((0, 2)),
                "mppd_l2": (eps**2).mean((0, 2)),
                "mppd_max": abs(eps).max((0, 2)),
                "full": (d**2).mean((0, 2)),
                "std": (s != s_perturbed).mean((0, 2)),
                "tasad": abs(s.mean(0) - s_perturbed.mean(0)).mean(1),
            }
            found = sample_indicators(trace)
            assert tuple(found) == tuple(expected) == INDICATORS
            for indicator, value in expected.items():
                np.testing.assert_allclose(found[indicator].numpy(), value, rtol=1e-4, atol=1e-6)
            one = neuron_indicators(trace)
            np.testing.assert_allclose(
                one["mppd_max"].numpy(), abs(eps).max(0), rtol=1e-4, atol=1e-6
            )
            np.testing.assert_allclose(one["std"].numpy(), (s != s_perturbed).mean(0), rtol=1e-5)


def test_study_is_the_loop_over_images_and_sizes():
    model = network()
    result, x, y = study(model, batch_size=7)
    assert (result.samples, result.left_out, result.eps) == (20, 0, SIZES)
    assert result.directions == ("noise", "darker")
    assert result.layers == ("net.2", "net.4")
    single, wrong, per_step = {}, [], {}
    with MPPDMonitor(model, keep="trace") as monitor:
        for size in SIZES:
            # in the same batches, since the noise starts anew in each
            parts = [(part, noise(part, None, size)) for part in x.split(7)]
            stats = [monitor.compare(*part) for part in parts]
            with torch.no_grad():
                wrong.append((torch.cat([model(part).argmax(1) for _, part in parts]) != y).numpy())
            for name in result.layers:
                weighted = [
                    len(part) / 20 * s[name].ms_mppd
                    for s, (part, _) in zip(stats, parts, strict=True)
                ]
                per_step.setdefault(name, []).append(sum(weighted).tolist())
                for indicator in INDICATORS:
                    traces = [
                        neuron_indicators(trace)[indicator].double().numpy()
                        for trace in monitor[name]
                    ]
                    single.setdefault((name, indicator), []).append(np.concatenate(traces))
            monitor.clear_recorded_data()
    for name in result.layers:
        np.testing.assert_allclose(result.per_step["noise"][name], per_step[name], rtol=1e-9)
    accuracy = [1 - part.mean() for part in wrong]
    assert result.accuracy["noise"] == pytest.approx(accuracy)
    assert 0 < np.mean(wrong) < 1
    sizes = np.repeat(SIZES, 20)
    for (name, indicator), neurons in single.items():
        rows = np.stack(neurons).max(2) if indicator == "mppd_max" else np.stack(neurons).mean(2)
        np.testing.assert_allclose(result.means["noise"][name][indicator], rows.mean(1), rtol=1e-5)
        found = result.associations["noise"][name][indicator]
        assert found["spearman"].value == pytest.approx(
            spearmanr(rows.ravel(), sizes).statistic, abs=1e-9
        )
        assert found["pearson"].value == pytest.approx(
            pearsonr(rows.ravel(), sizes).statistic, abs=1e-6
        )
        each = [
            spearmanr(rows[:, i], SIZES).statistic if np.ptp(rows[:, i]) else 0.0 for i in range(20)
        ]
        assert found["per_image"].value == pytest.approx(np.mean(each), abs=1e-9)
        assert found["auroc"].value == pytest.approx(
            roc_auc_score(np.ravel(wrong), rows.ravel()), abs=1e-9
        )
        each = [
            spearmanr(one, sizes).statistic if np.ptp(one) else 0.0
            for one in np.concatenate(neurons).T
        ]
        assert found["per_neuron"].value == pytest.approx(np.mean(each), abs=1e-6)
        pairs = [
            (a > b) + 0.5 * (a == b)
            for w, r in zip(wrong, rows, strict=True)
            for a in r[w]
            for b in r[~w]
        ]
        assert found["auroc_same_size"].value == pytest.approx(np.mean(pairs), abs=1e-9)


def test_intervals_are_those_of_images_drawn_again():
    model = network()
    result, x, _ = study(model, perturb={"noise": noise})
    with MPPDMonitor(model, keep="trace") as monitor:
        for size in SIZES:
            monitor.compare(x, noise(x, None, size))
        traces = monitor["net.4"]
        tasad = np.stack(
            [neuron_indicators(trace)["tasad"].double().numpy().mean(1) for trace in traces]
        )
    drawn = torch.randint(20, (20, 20), generator=torch.Generator().manual_seed(0)).numpy()
    again = [
        spearmanr(tasad[:, images].ravel(), np.repeat(SIZES, 20)).statistic for images in drawn
    ]
    found = result.associations["noise"]["net.4"]["tasad"]["spearman"]
    assert (found.low, found.high) == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=1e-9)
    assert 0 < found.high - found.low < 1


def test_seed_decides_the_intervals_and_nothing_else_and_it_says_what_it_does():
    said = []
    assert study(say=said.append)[0] == usual()
    runs = [
        f"{direction} at eps {size}: 20 images"
        for direction in usual().directions
        for size in SIZES
    ]
    assert said == [*runs, "intervals from 20 bootstrap samples"]
    other = study(seed=1)[0]
    assert usual().associations != other.associations
    assert (usual().means, usual().accuracy) == (other.means, other.accuracy)


def test_images_wrong_already_are_left_out():
    model = network()
    x, y = classified(model, 10)
    y[3] = (y[3] + 1) % 3
    darker = {"darker": lambda x, y, eps: x - eps}
    result = intensity_correlation(model, x, y, perturb=darker, eps=SIZES, resamples=2)
    others = torch.arange(10) != 3
    assert (result.samples, result.left_out) == (9, 1)
    without = intensity_correlation(
        model, x[others], y[others], perturb=darker, eps=SIZES, resamples=2
    )
    assert result == replace(without, left_out=1)


def test_nobody_fooled_means_no_auroc():
    result = study(perturb={"none": lambda x, y, eps: x}, layers=["net.2"])[0]
    found = result.associations["none"]["net.2"]["mppd_l2"]
    assert found["auroc"].value is found["spearman"].value is found["spearman"].low is None
    assert found["per_image"].value == 0.0
    assert "not defined" in result.table("none")
    assert IntensityCorrelation.from_json(result.to_json()) == result


def test_round_trip_and_table():
    result = usual()
    assert IntensityCorrelation.from_json(result.to_json()) == result
    with pytest.raises(ValueError, match="not an intensity study"):
        IntensityCorrelation.from_json("{}")
    lines = result.table("noise").splitlines()
    assert len(lines) == 2 + 2 * len(INDICATORS)
    found = result.associations["noise"]["net.4"]["tasad"]["spearman"]
    assert f"{found.value:.2f} ({found.low:.2f}, {found.high:.2f})" in lines[-1]
    assert not any(math.isnan(value) for value in result.accuracy["noise"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"perturb": {}}, "at least one direction"),
        ({"eps": [0.1]}, "two growing sizes > 0"),
        ({"eps": [0.0, 0.1]}, "two growing sizes > 0"),
        ({"eps": [0.2, 0.1]}, "two growing sizes > 0"),
        ({"resamples": 0}, "resamples must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_wrong_use(options, reason):
    with pytest.raises(ValueError, match=reason):
        study(**options)


def test_untrained_and_unequal_are_refused():
    model = network()
    x, y = classified(model, 4)
    with pytest.raises(ValueError, match="none of the 4 images right"):
        intensity_correlation(model, x, (y + 1) % 3, perturb={"noise": noise}, eps=SIZES)
    with pytest.raises(ValueError, match="as many images as classes, at least one, got 4 and 3"):
        intensity_correlation(model, x, y[:3], perturb={"noise": noise}, eps=SIZES)
