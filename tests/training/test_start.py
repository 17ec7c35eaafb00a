"""How good a network is before its training: a lost normalisation is told, with the options that
bring it back; so are validation images that it was trained on.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training.small_run import splits

from sj_robust import SpikingClassifier
from sj_robust.data import load_images
from sj_robust.training import save_checkpoint
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
