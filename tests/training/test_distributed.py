"""Two processes (gloo) train what one does; all their runs are of one launch, see
small_run.SCENARIOS.
"""

from functools import partial

import launch
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from training import small_run

from sj_robust import SpikingClassifier
from sj_robust.training import load_checkpoint, validation

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def several_validation_batches(monkeypatch):
    monkeypatch.setattr(validation, "_BATCH", 5)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder that two processes have worked in."""
    folder = tmp_path_factory.mktemp("two")
    attack = small_run.At(7, small_run.power_cut)
    with pytest.raises(small_run.PowerCutError):
        small_run.run(folder / "one_to_two", **small_run.CUT, perturb=attack)
    assert launch.two_processes(partial(small_run.main, folder)) == [0, 0]
    return folder


def last(folder):
    return load_checkpoint(folder / "last.pt")


def assert_same_training(one, two):
    assert_close(two["model"], one["model"], rtol=1e-9, atol=1e-11)
    for record, other in zip(one["history"], two["history"], strict=True):
        assert record["validation"] == other["validation"]
        losses = pytest.approx(other["losses"], rel=1e-9)
        assert record["losses"] == losses


COMPARED = [name for name in small_run.SCENARIOS if name != "apart"]


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_train_the_same_weights_as_one(two, tmp_path, name):
    small_run.run(tmp_path, **small_run.SCENARIOS[name])
    one = last(tmp_path)
    other = last(two / name)
    assert len(one["random"]) == 1
    assert len(other["random"]) == 2
    assert_same_training(one, other)


def test_a_run_continues_on_another_number_of_processes(two, tmp_path):
    small_run.run(tmp_path, **small_run.CUT)
    whole = last(tmp_path)
    assert last(two / "two_to_one")["batch"] == 2  # in the middle of an epoch
    small_run.run(two / "two_to_one", **small_run.CUT, resume=True)
    assert_same_training(whole, last(two / "two_to_one"))
    assert_same_training(whole, last(two / "one_to_two"))


def test_what_cannot_be_trained_on_several_devices(tmp_path, monkeypatch):
    def wrapped_later(net, T):  # a classifier refuses a network that is wrapped already
        classifier = SpikingClassifier(net, T)
        classifier.net = nn.DataParallel(classifier.net)
        return classifier

    message = r"classifier.net is wrapped in DataParallel.*torchrun or accelerate launch"
    with monkeypatch.context() as patch:
        patch.setattr(small_run, "SpikingClassifier", wrapped_later)
        with pytest.raises(ValueError, match=message):
            small_run.run(tmp_path)
    message = r"multiple of processes \* accumulate = 1 \* 3, got 16; 18 is one"
    with pytest.raises(ValueError, match=message):
        small_run.run(tmp_path, accumulate=3)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ValueError, match="gradient_accumulation_steps 1, got 2; set accumulate"):
        small_run.run(tmp_path)


def test_gradients_of_parts_are_averaged(tmp_path):
    """Without batch norm, parts are the whole, in whatever number."""
    options = {"dtype": torch.float64, "epochs": 1}
    small_run.run(tmp_path / "whole", **options)
    small_run.run(tmp_path / "parts", **options, accumulate=4)
    assert_same_training(last(tmp_path / "whole"), last(tmp_path / "parts"))


def test_what_stops_one_process_stops_both_at_the_same_step_and_only_the_first_one_writes(two):
    """Or the launch had failed; the second process met a loss that is not finite, or a signal, at
    its first step.
    """
    assert not list((two / "nan").iterdir())
    assert last(two / "signal")["batch"] == 1
    assert not list(two.rglob("*.tmp"))
    left = [path.name for path in (two / "attack").iterdir()]
    assert sorted(left) == ["best.pt", "last.pt"]
