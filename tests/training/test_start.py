"""How good a network is before its training: a lost normalisation is told, with the options that
bring it back.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training.small_run import splits

from sj_robust import SpikingClassifier
from sj_robust.training.validation import check_start


class Brightest(nn.Module):
    """Names the brightest of three rows if it is above 0.99, as it is in normalised images alone,
    else class 3.
    """

    def forward(self, x_seq):
        three = x_seq[:, :, 0, :3].mean(-1)
        return torch.cat([three, torch.full_like(three[..., :1], 0.99)], dim=-1)


@pytest.fixture
def said():
    """What was told."""
    return []


@pytest.mark.parametrize("given", [False, True])
def test_a_lost_normalisation_is_told_with_the_options_that_bring_it_back(given, said):
    options = {"mean": [0.2], "std": [0.25]} if given else {}
    classifier = SpikingClassifier(Brightest(), 2, takes="sequence", **options)
    check_start(classifier, splits(), SimpleNamespace(say=said.append), "mine.pt")
    right = "100.0" if given else "0.0"
    assert said[0] == f"starting from mine.pt: {right}% of 12 validation images correct"
    if given:
        assert len(said) == 1
    else:
        (text,) = said[1:]
        assert text.startswith("WARNING: with --mean 0.")
        assert "100.0% are right: the network expects normalised images" in text


class Constant(Brightest):
    def forward(self, x_seq):
        return super().forward(0 * x_seq)


def test_guessing_is_warned_of(said):
    classifier = SpikingClassifier(Constant(), 2, takes="sequence")
    check_start(classifier, splits(), SimpleNamespace(say=said.append), "mine.pt")
    advice = "that is no better than guessing; check the weights, --mean, --std and --tau"
    assert said[1] == f"WARNING: {advice}"
