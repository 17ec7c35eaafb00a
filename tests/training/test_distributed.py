"""Two processes (gloo) train what one does; all their runs are of one launch, see
small_run.SCENARIOS.
"""

import launch
import pytest
import torch
from torch import nn
from training import small_run

from sj_robust import SpikingClassifier
from sj_robust.training import load_checkpoint, validation
from sj_robust.training.batch_norm import share_buffers, synchronised_batch_norm

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def several_validation_batches(monkeypatch):
    monkeypatch.setattr(validation, "_BATCH", 5)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder that two processes have worked in."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.raises(small_run.PowerCutError):
        small_run.run(
            folder / "one_to_two", **small_run.CUT, perturb=small_run.At(7, small_run.power_cut)
        )
    result = launch.script(small_run.__file__, folder)
    assert result.stdout.split() == ["0", "0"], result.stderr
    return folder


def assert_close(one, two):
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-9, atol=1e-11)
    for record, other in zip(one["history"], two["history"], strict=True):
        assert record["validation"] == other["validation"]
        assert record["losses"] == pytest.approx(other["losses"], rel=1e-9)


@pytest.mark.parametrize("name", [name for name in small_run.SCENARIOS if name != "apart"])
def test_two_processes_train_the_same_weights_as_one(two, tmp_path, name):
    small_run.run(tmp_path / name, **small_run.SCENARIOS[name])
    one, other = (load_checkpoint(folder / name / "last.pt") for folder in (tmp_path, two))
    assert (len(one["random"]), len(other["random"])) == (1, 2)
    assert_close(one, other)


def test_statistics_of_each_process_alone_train_other_weights(two):
    """So the comparison above would see it if batch norm were not synchronised."""
    apart, together = (
        load_checkpoint(two / name / "last.pt")["model"] for name in ("apart", "synchronised")
    )
    assert (apart["net.1.running_var"] - together["net.1.running_var"]).abs().max() > 1e-4
    assert apart.keys() == together.keys()


def test_a_run_continues_on_another_number_of_processes(two, tmp_path):
    small_run.run(tmp_path / "whole", **small_run.CUT)
    whole = load_checkpoint(tmp_path / "whole" / "last.pt")
    assert (
        load_checkpoint(two / "two_to_one" / "last.pt")["batch"] == 2
    )  # in the middle of an epoch
    small_run.run(two / "two_to_one", **small_run.CUT, resume=True)
    for name in ("one_to_two", "two_to_one"):
        assert_close(whole, load_checkpoint(two / name / "last.pt"))


def test_one_process_needs_no_synchronisation(tmp_path):
    options = small_run.SCENARIOS["apart"]
    small_run.run(tmp_path / "a", **options)
    _, classifier = small_run.run(tmp_path / "b", **options, sync_batch_norm=True)
    one, other = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("a", "b"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert type(classifier.net[1]) is type(small_run.batch_norm_net()[1])


def test_a_synchronised_network_is_itself_again():
    net = small_run.batch_norm_net()
    classes = [type(module) for module in net.modules()]
    keys = list(net.state_dict())
    context = synchronised_batch_norm(net)
    context.__enter__()
    assert isinstance(net[1], classes[2])
    assert type(net[1]) is not classes[2]
    assert list(net.state_dict()) == keys
    assert context.__exit__(ValueError, ValueError(), None) is False
    assert [type(module) for module in net.modules()] == classes
    share_buffers(net)  # nothing to do without processes


def test_what_cannot_be_trained_on_several_devices(tmp_path, monkeypatch):
    def wrapped_later(net, T):  # a classifier refuses a network that is wrapped already
        classifier = SpikingClassifier(net, T)
        classifier.net = nn.DataParallel(classifier.net)
        return classifier

    with monkeypatch.context() as patch:
        patch.setattr(small_run, "SpikingClassifier", wrapped_later)
        with pytest.raises(
            ValueError,
            match=r"classifier.net is wrapped in DataParallel.*torchrun or accelerate launch",
        ):
            small_run.run(tmp_path)
    with pytest.raises(
        ValueError, match=r"multiple of processes \* accumulate = 1 \* 3, got 16; 18 is one"
    ):
        small_run.run(tmp_path, accumulate=3)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ValueError, match="gradient_accumulation_steps 1, got 2; set accumulate"):
        small_run.run(tmp_path)


def test_gradients_of_parts_are_averaged(tmp_path):
    """Without batch norm, parts are the whole, in whatever number."""
    whole, _ = small_run.run(tmp_path / "whole", dtype=torch.float64, epochs=1)
    for parts in (2, 4):
        history, _ = small_run.run(
            tmp_path / str(parts), dtype=torch.float64, epochs=1, accumulate=parts
        )
        assert history[-1].losses == pytest.approx(whole[-1].losses, rel=1e-9)
        assert_close(
            *(load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", str(parts)))
        )


def test_what_stops_one_process_stops_both_at_the_same_step_and_only_the_first_one_writes(two):
    """Or the launch had failed; the second process met a loss that is not finite, or a signal, at
    its first step.
    """
    assert not list((two / "nan").iterdir())
    assert load_checkpoint(two / "signal" / "last.pt")["batch"] == 1
    assert not list(two.rglob("*.tmp"))
    assert {path.name for path in (two / "attack").iterdir()} == {"last.pt", "best.pt"}
