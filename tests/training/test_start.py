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


EARLIER = {"dataset": "digits", "seed": 0, "train_limit": None, "validation_fraction": 0.1}


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ({"seed": 1}, {}),
        ({"seed": 1}, {"name": "saccade:digits", "T": 2}),
        ({"validation_fraction": 0.05}, {}),
        ({"train_limit": 200}, {}),
    ],
)
def test_validation_images_of_an_earlier_training_are_told(tmp_path, earlier, now):
    options = EARLIER | earlier
    images = load_images(**{"name": "digits"} | now)
    trained_on = load_images("digits", **earlier).train.indices
    seen = len(set(trained_on).intersection(images.validation.indices))
    assert seen > 0
    warning = seen_before(checkpoint(tmp_path, options), images)
    assert f"best.pt was trained on {seen} of the 143 validation images" in warning
    same = "--seed {seed} --train-limit {train_limit} --validation-fraction {validation_fraction}"
    assert warning.endswith(same.format(**options))


def checkpoint(folder, options):
    """One of a training with these options."""
    content = {"model": {"w": torch.zeros(1)}, "description": {"options": options}}
    save_checkpoint(folder / "best.pt", content)
    return folder / "best.pt"


@pytest.mark.parametrize(
    "earlier",
    [
        EARLIER,
        EARLIER | {"validation_fraction": 0.2},  # whose first half is held out now
        EARLIER | {"seed": 1, "dataset": "mnist"},
        {"dataset": "digits"},
    ],
)
def test_a_training_on_other_images_is_not_warned_of(tmp_path, earlier):
    assert seen_before(checkpoint(tmp_path, earlier), load_images("digits")) is None


def test_files_and_data_that_do_not_tell_the_split_are_not_warned_of(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "bare.pt")
    assert seen_before(tmp_path / "bare.pt", load_images("digits")) is None
    of_stripes = checkpoint(tmp_path, EARLIER | {"seed": 1, "dataset": "stripes"})
    assert seen_before(of_stripes, splits()) is None  # which have a validation set
