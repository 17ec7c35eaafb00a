"""How good a network is before its training: a lost normalisation is told, with the options that
bring it back; so are validation images that it was trained on, and catastrophic overfitting.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training.small_run import splits

from sj_robust import SpikingClassifier
from sj_robust.data import load_images
from sj_robust.training import save_checkpoint
from sj_robust.training.journal import EpochRecord, catastrophic_overfitting
from sj_robust.training.validation import check_start, seen_before


class Brightest(nn.Module):
    """Names the brightest of three rows if it is above 0.99, as it is in normalised images alone,
    else class 3.
    """

    def forward(self, x_seq):
        three = x_seq[:, :, 0, :3].mean(-1)
        return torch.cat([three, torch.full_like(three[..., :1], 0.99)], dim=-1)


class Constant(Brightest):
    def forward(self, x_seq):
        return super().forward(0 * x_seq)


@pytest.mark.parametrize(
    ("net", "options", "expected"),
    [
        (Brightest, {"mean": [0.2], "std": [0.25]}, None),
        (Brightest, {}, "--mean 0."),
        (Constant, {}, "guessing"),
    ],
)
def test_a_network_that_is_no_good_at_the_start_is_warned_of(net, options, expected):
    said = []
    classifier = SpikingClassifier(net(), 2, takes="sequence", **options)
    check_start(classifier, splits(), SimpleNamespace(say=said.append), "mine.pt")
    assert "mine.pt" in said[0]
    assert [expected in text for text in said[1:]] == [True] * (expected is not None)


EARLIER = {"dataset": "digits", "seed": 0, "train_limit": None, "validation_fraction": 0.1}


EVENTS = {"name": "saccade:digits", "T": 2}


@pytest.mark.parametrize(
    ("earlier", "now", "warned"),
    [
        ({"seed": 1}, {}, True),
        ({"seed": 1}, EVENTS, True),
        ({"validation_fraction": 0.05}, {}, True),
        ({"train_limit": 200}, {}, True),
        ({}, {}, False),
        ({"validation_fraction": 0.2}, {}, False),  # whose first half is held out now
        ({"seed": 1, "dataset": "mnist"}, {}, False),
    ],
)
def test_validation_images_of_an_earlier_training_are_told(tmp_path, earlier, now, warned):
    options = EARLIER | earlier
    images = load_images(**{"name": "digits"} | now)
    content = {"model": {"w": torch.zeros(1)}, "description": {"options": options}}
    save_checkpoint(tmp_path / "best.pt", content)
    warning = seen_before(tmp_path / "best.pt", images)
    if warned:
        trained_on = load_images("digits", **earlier).train.indices
        seen = len(set(trained_on).intersection(images.validation.indices))
        assert f"{seen} of the 143 validation images" in warning
    else:
        assert warning is None
    assert seen_before(tmp_path / "best.pt", splits()) is None  # which have a validation set
    torch.save({"w": torch.zeros(1)}, tmp_path / "bare.pt")
    assert seen_before(tmp_path / "bare.pt", images) is None


HEALTHY = (0.80, 0.55, 0.45)
"""Validation accuracy: clean, FGSM, PGD."""


def warned(epochs):
    history = []
    for number, accuracies in enumerate(epochs, 1):
        validation = dict(zip(("clean", "fgsm", "pgd"), accuracies, strict=True))
        history.append(EpochRecord(number, {}, validation, 0.1))
    return catastrophic_overfitting(history) is not None


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([HEALTHY, (0.85, 0.90, 0.10)], True),  # FGSM above clean, PGD gone
        ([HEALTHY, (0.85, 0.70, 0.20), (0.85, 0.80, 0.05)], True),  # FGSM far above PGD
        ([(0.80, 0.10, 0.08), (0.85, 0.88, 0.01)], True),  # PGD was low from the start
        ([], False),
        ([(0.5, 0.2, 0.1)], False),
        ([HEALTHY, (0.85, 0.60, 0.50)], False),  # healthy still
        ([HEALTHY, (0.85, 0.58, 0.40)], False),  # noise
        ([(0.90, 0.55, 0.45), (0.30, 0.20, 0.18)], False),  # everything falls
        ([(0.98, 0.70, 0.60), (0.98, 0.71, 0.50)], False),  # an undefended network
    ],
)
def test_catastrophic_overfitting_is_seen(epochs, expected):
    assert warned(epochs) == expected
