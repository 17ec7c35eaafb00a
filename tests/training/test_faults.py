"""Whatever breaks a run says what it was, leaves the last good checkpoint, and the run goes on from
there.
"""

import errno
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import launch
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import TensorDataset, get_worker_info
from training import small_run
from training.small_run import At, nan_images

from sj_robust.attacks import pgd
from sj_robust.data.files import UnreadableError
from sj_robust.data.stored import FileImages
from sj_robust.models import checkpoint
from sj_robust.training import Journal, NonFiniteLossError, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow

STEP = 6  # the second of epoch 2; an epoch has four


def run(folder, **options):
    """As the run that nothing disturbs."""
    return small_run.run(folder, dropout=0.3, **options)


def images_by(read):
    """The splits whose training images are what ``read`` makes of them."""
    splits = small_run.splits()
    x, y = splits.train.tensors

    def read_path(path):
        return read(x[int(path.name)])

    return replace(splits, train=FileImages(range(len(y)), y, read_path))


def assert_goes_on(folder, whole, *, position=(1, 0), **options):
    """The checkpoints that the fault left are whole, and a resumed run ends as one unbroken and
    leaves nothing else.
    """
    content = load_checkpoint(folder / "last.pt")
    assert (content["epoch"], content["batch"]) == position
    assert load_checkpoint(folder / "best.pt")["epoch"] <= position[0]
    history, classifier = run(folder, resume=True, **options)
    assert history == whole.history
    state = dict(classifier.state_dict())
    assert_close(state, whole.weights["last.pt"], rtol=0, atol=0)
    found = sorted(path.name for path in folder.iterdir())
    assert found == ["best.pt", "last.pt"]


def test_killed_in_a_step_and_while_a_checkpoint_is_written(tmp_path, whole):
    in_step = partial(run, tmp_path / "step", perturb=At(STEP, die))
    in_write = partial(run, tmp_path / "write", perturb=At(STEP, write_no_more))
    assert launch.forked(in_step, in_write) == [-signal.SIGKILL] * 2
    (half,) = (tmp_path / "write").glob("*.tmp")
    assert half.stat().st_size > 0
    assert_goes_on(tmp_path / "step", whole)
    assert_goes_on(tmp_path / "write", whole)


def full_disk_in_write(monkeypatch):
    opened = Path.open

    def open_full(path, *args, **kwargs):
        return opened(Path("/dev/full"), *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)


def full_disk_at_sync(monkeypatch):
    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("fill", [full_disk_in_write, full_disk_at_sync])
def test_a_full_disk(tmp_path, whole, fill):
    message = r"(best|last)\.pt could not be written \(.*intact.*[Ff]ree.*--resume"
    with pytest.MonkeyPatch.context() as patch:
        attack = At(STEP, lambda *_: fill(patch))
        with pytest.raises(OSError, match=message):
            run(tmp_path, perturb=attack)
    assert_goes_on(tmp_path, whole)


def nan_gradient(model, x_perturbed):
    weight = model.net.parts[0].weight
    weight.register_hook(lambda grad: grad * float("nan"))


@pytest.mark.parametrize(
    ("action", "found"),
    [
        (nan_images, r"loss is not finite \(total=nan.* epoch 2, step 2"),
        (nan_gradient, "holds NaN or infinity at epoch 2"),
    ],
)
def test_nan_in_the_loss_and_in_the_weights(tmp_path, whole, action, found):
    with pytest.raises(NonFiniteLossError, match=r"no checkpoint was written yet\. Lower lr"):
        run(tmp_path, perturb=At(1, nan_images))
    assert not any(tmp_path.iterdir())
    with pytest.raises(NonFiniteLossError, match=rf"{found}.*last\.pt, is intact\. Lower lr"):
        run(tmp_path, perturb=At(STEP, action))
    assert_goes_on(tmp_path, whole)


def test_a_learning_rate_that_is_too_high(tmp_path):
    attack = partial(pgd, eps=0.1, step_size=0.1, steps=1)
    message = r"at epoch 1, step \d; no checkpoint was written yet\. Lower lr"
    with pytest.raises(NonFiniteLossError, match=message):
        run(tmp_path, perturb=attack, lr=1e30)


def test_a_process_that_loads_images_dies(tmp_path, whole):
    """It is killed in the second epoch, which it recognises by the checkpoint of the first."""

    def read(image):
        if get_worker_info() is not None and (tmp_path / "last.pt").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return image

    with pytest.raises(ChildProcessError, match=r"was killed .*use fewer than 1 workers, or none"):
        run(tmp_path, data=images_by(read), workers=1)
    assert_goes_on(tmp_path, whole, workers=1)


def test_a_picture_that_cannot_be_read_any_more(tmp_path, whole):
    cut = []

    def read(image):
        if cut:
            raise UnreadableError("7.raw is cut off; replace it")
        return image

    data = images_by(read)
    with pytest.raises(UnreadableError, match=r"\.raw is cut off; replace it"):
        run(tmp_path, data=data, perturb=At(STEP, lambda *_: cut.append(True)))
    cut.clear()
    assert_goes_on(tmp_path, whole, data=data)


def train_on_labels(folder, spoil, perturb):
    splits = small_run.splits()
    x, y = splits.train.tensors
    data = replace(splits, train=TensorDataset(x, spoil(y)))
    run(folder, data=data, perturb=perturb)


@pytest.mark.parametrize("perturb", [None, small_run.ATTACK])
@pytest.mark.parametrize("label", [3, -1, -100])
def test_labels_outside_the_classes(tmp_path, label, perturb):
    """On a GPU they would end the process in cross entropy, and -100 would be left out."""

    def spoil(y):
        y[9] = label
        return y

    message = rf"labels must be classes from 0 to 2, got {label} .*epoch 1, step \d; correct"
    with pytest.raises(ValueError, match=message):
        train_on_labels(tmp_path, spoil, perturb)


@pytest.mark.parametrize("perturb", [None, small_run.ATTACK])
@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (torch.Tensor.float, r"float32 \[16\]"),
        (torch.nn.functional.one_hot, r"int64 \[16, 3\]"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, spoil, found, perturb):
    with pytest.raises(ValueError, match=rf"labels must be int64 \[N\], got {found}"):
        train_on_labels(tmp_path, spoil, perturb)


def damaged(path):
    path.write_bytes(path.read_bytes()[:-200])


def of_something_else(path):
    torch.save({"w": torch.zeros(1)}, path)


def weights_alone(path):
    content = load_checkpoint(path)
    kept = {"description": content["description"], "model": content["model"]}
    save_checkpoint(path, kept)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (damaged, r"cannot be read as a checkpoint .*best\.pt, .*, can take its name"),
        (of_something_else, "is not a checkpoint of sj_robust .*check the path"),
        (
            weights_alone,
            r"last\.pt holds no optimizer, scheduler, .*: .*start a new run with another --output",
        ),
    ],
)
def test_a_run_is_resumed_from_a_file_that_is_none_of_its(tmp_path, whole, spoil, found):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    spoil(folder / "last.pt")
    with pytest.raises(ValueError, match=found):
        run(folder, resume=True)
    shutil.copy(folder / "best.pt", folder / "last.pt")
    best = load_checkpoint(folder / "best.pt")
    assert_goes_on(folder, whole, position=(best["epoch"], 0))


def test_the_folder_is_deleted_meanwhile(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match=r"last\.pt could not be written: .*run is gone.* --resume"):
        run(folder, perturb=At(STEP, lambda *_: shutil.rmtree(folder)), checkpoint_steps=2)


def test_the_log_cannot_be_written_any_more(tmp_path, whole):
    logs = tmp_path / "logs"
    logs.mkdir()
    attack = At(STEP, lambda *_: shutil.rmtree(logs))
    message = r"log\.txt could not be written \(No such file .*restore the folder.*--resume"
    with pytest.raises(OSError, match=message):
        run(tmp_path / "run", journal=Journal(logs), perturb=attack)
    assert_goes_on(tmp_path / "run", whole, position=(2, 0))


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(content, file):
    file.write(b"half a checkpoint")
    file.flush()
    die()


def write_no_more(*_):
    checkpoint.torch.save = die_writing
