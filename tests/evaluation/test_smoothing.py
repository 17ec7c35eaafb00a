"""The bracket of a smoothed classifier: a linear one, whose robust accuracy is known, and votes
that contradict.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.evaluation import Report, smoothed_bracket
from sj_robust.models import NetworkSpec, build_network
from sj_robust.proofs import smooth

SIGMA = 0.25


def seeded():
    return torch.Generator().manual_seed(0)


def half_space():
    net = nn.Linear(2, 2, bias=False)
    net.weight.data.copy_(torch.eye(2))
    return net


DISTANCES = torch.tensor([-0.1, 0.0, 0.05, 0.1, 0.2, 0.3])
X = 0.5 + DISTANCES.unsqueeze(1) * torch.tensor([1.0, -1.0]) / 2**0.5
Y = torch.zeros(6, dtype=torch.int64)


def bracket(smoothing, radii=(0.25, 0.0, 0.15), **options):
    return smoothed_bracket(
        half_space(), X, Y, smoothing, **{"eps": radii, "steps": 5, "eot_samples": 4} | options
    )


def ends(found, radius):
    return tuple(one.correct for one in found.bracket_at(radius))


def left(found):
    """Images that stand after the attack at every radius."""
    kept = [found.standing("clean")]
    for row in found.attacks:
        kept.append(kept[-1] - set(row.fell))
    return kept


def test_the_true_accuracy_of_a_half_space_lies_in_the_bracket():
    found = bracket(smooth(half_space(), X, SIGMA, n=4000, batch_size=4000, generator=seeded()))
    assert [row.eps for row in found.attacks] == [0.15, 0.25]
    assert found.contradicted == ()
    proved = [row.stood for row in found.rows if row.kind == "proof"]
    assert proved == [{2, 3, 4, 5}, {4, 5}, {5}]
    # The vote abstains at image 1 until it is attacked.
    assert left(found) == [{1, 2, 3, 4, 5}, {4, 5}, {5}]
    assert ends(found, 0.15) == (2, 2)
    assert found.table().splitlines()[-1] == "| 0.25 | 16.7 | 16.7 |"
    assert found.verdict == (
        "Robust accuracy of the smoothed classifier at L2 0.15 is between 33.3 % (certified) and "
        "33.3 % (under attack); 6 images, sigma 0.25, votes of 4000 samples."
    )
    assert Report.from_json(found.to_json()) == found
    with pytest.raises(KeyError, match=r"nothing is proved at 0\.2"):
        found.bracket_at(0.2)


@pytest.mark.slow
def test_the_picture_shows_both_ends(tmp_path):
    pytest.importorskip("matplotlib", reason="extra `recipes` draws")
    found = bracket(smooth(half_space(), X, SIGMA, generator=seeded()), [0.0, 0.25])
    lines = found.plot(path=tmp_path / "both.png").axes[0].lines
    brackets = [found.bracket_at(radius) for radius in (0, 0.25)]
    most = [100 * upper.accuracy for _, upper in brackets]
    least = [100 * lower.accuracy for lower, _ in brackets]
    assert lines[0].get_ydata() == pytest.approx(most)
    assert lines[1].get_ydata() == pytest.approx(least)
    assert (tmp_path / "both.png").stat().st_size > 0
    assert found.write(tmp_path) == ("smoothed.json", "smoothed.png", "smoothed.pdf")


@pytest.mark.slow
def test_lower_ends_never_exceed_upper_ones_on_a_spiking_network_which_stays_as_it_was():
    torch.manual_seed(0)
    model = SpikingClassifier(build_network(NetworkSpec(channels=(4, 4))), T=4).train()
    x = torch.rand(6, 1, 8, 8)
    smoothing = smooth(model, x, 0.1, n0=10, n=60, generator=seeded())
    y = torch.tensor([max(label, 0) for label in smoothing.prediction])
    radii = [0.0, 0.05, 0.5]
    found = smoothed_bracket(model, x, y, smoothing, radii, steps=3, n0=10)
    counts = [ends(found, radius) for radius in radii]
    for low, high in counts:
        assert low <= high
    assert counts == sorted(counts, reverse=True)
    assert counts[0][0] > 0
    assert model.training


def test_a_certified_image_that_falls_is_named_and_does_not_count_as_certified():
    smoothing = smooth(half_space(), X, SIGMA, generator=seeded())
    wrong = replace(smoothing, radius=(*smoothing.radius[:3], 0.6, *smoothing.radius[4:]))
    found = bracket(wrong)
    assert found.contradicted == (3,)
    for radius in (0, 0.15, 0.25):
        assert ends(found, radius)[0] <= ends(found, radius)[1]
    expected = ends(bracket(smoothing), 0.15)[0]
    assert ends(found, 0.15)[0] == expected
    assert "Certified, but broken by an attack: image 3 (of 6). Each" in found.table()


def test_radii_may_be_an_array():
    smoothing = smooth(half_space(), X, SIGMA, generator=seeded())
    found = bracket(smoothing, radii=np.array([0.0, 0.15]))
    assert ends(found, 0.15) == ends(bracket(smoothing, radii=["0", 0.15]), 0.15)
    assert ends(bracket(smoothing, radii=0.0), 0.0) == ends(found, 0.0)
