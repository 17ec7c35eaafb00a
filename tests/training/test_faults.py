"""Whatever breaks or stops a run leaves the last good checkpoint, from which it goes on to the
weights of one that nothing disturbed.
"""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import launch
import pytest
import torch
from covering import mostly_slow
from torch import nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset, get_worker_info
from training import small_run
from training.small_run import At, PowerCutError, nan_images, of_nodes, power_cut

from sj_robust import DLIFNode
from sj_robust.attacks import ThreatModel, pgd
from sj_robust.data.files import UnreadableError
from sj_robust.data.stored import FileImages
from sj_robust.defences import EvolvingLeakNode, HomeostaticNode, NoisyLIFNode, StochasticGate
from sj_robust.defences.stog import GateRates
from sj_robust.models import checkpoint
from sj_robust.training import (
    Journal,
    NonFiniteLossError,
    TrainingInterrupted,
    load_checkpoint,
    save_checkpoint,
)

STEP = 6  # the second of epoch 2; an epoch has four


THREAT = ThreatModel("Linf", 0.05)
CERTIFIED = {"loss": "certified", "certified_eps": 0.05, "kappa": 0.2}
GATED = (partial(DLIFNode, T=3, tau=4.0), StochasticGate)
RUNS = {
    "dropout": {"dropout": 0.3},
    "certified": {"objective": CERTIFIED, "select": "verified", "verified": THREAT},
    "noise": of_nodes(partial(NoisyLIFNode, 4.0)),
    "leak": of_nodes(partial(EvolvingLeakNode, 3)),
    "homeostasis": of_nodes(partial(HomeostaticNode, 3, 4.0)),
    "gates": of_nodes(*GATED, penalties=[GateRates(1e-3)]),
}


CUTS = [("dropout", 2, 1), ("dropout", 6, None), *((name, 6, 3) for name in RUNS)]
QUICK = [cut for cut in CUTS if cut[0] in ("dropout", "gates", "certified")]


@pytest.mark.parametrize(("name", "call", "checkpoint_steps"), mostly_slow(CUTS, quick=QUICK))
def test_a_run_that_was_cut_off_ends_at_the_same_weights(tmp_path, name, call, checkpoint_steps):
    options = RUNS[name] | {"epochs": 2}
    whole, _ = small_run.run(tmp_path / "whole", **options)
    options["checkpoint_steps"] = checkpoint_steps
    with pytest.raises(PowerCutError):
        small_run.run(tmp_path / "cut", **options, perturb=At(call, power_cut))
    torch.manual_seed(99)  # whatever ran in between
    history, _ = small_run.run(tmp_path / "cut", **options, resume=True)
    assert history == whole
    for file in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(tmp_path / run / file)["model"] for run in ("whole", "cut"))
        assert_close(other, one, rtol=0, atol=0)
    learned = {"leak": "leak", "homeostasis": "rate", "gates": "rate"}
    for key in one:
        if key.endswith(f".{learned.get(name)}"):  # though it had no shape at first
            assert len(one[key].unique()) > 1


def run(folder, **options):
    """As the run that nothing disturbs."""
    return small_run.run(folder, dropout=0.3, **options)


def assert_goes_on(folder, whole, *, position=(1, 0), **options):
    """The checkpoints that the fault left are whole, and a resumed run ends as one unbroken and
    leaves nothing else.
    """
    content = load_checkpoint(folder / "last.pt")
    assert (content["epoch"], content["batch"]) == position
    assert load_checkpoint(folder / "best.pt")["epoch"] <= position[0]
    history, classifier = run(folder, resume=True, **options)
    assert history == whole.history
    assert_close(dict(classifier.state_dict()), whole.weights["last.pt"], rtol=0, atol=0)
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "last.pt"]


@pytest.mark.slow
def test_killed_in_a_step_and_while_a_checkpoint_is_written(tmp_path, whole):
    in_step = partial(run, tmp_path / "step", perturb=At(STEP, die))
    in_write = partial(run, tmp_path / "write", perturb=At(STEP, write_no_more))
    assert launch.forked(in_step, in_write) == [-signal.SIGKILL] * 2
    (half,) = (tmp_path / "write").glob("*.tmp")
    assert half.stat().st_size > 0
    assert_goes_on(tmp_path / "step", whole)
    assert_goes_on(tmp_path / "write", whole)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(content, file):
    file.write(b"half a checkpoint")
    file.flush()
    die()


def write_no_more(*_):
    checkpoint.torch.save = die_writing


def full_in_write(patch):
    opened = Path.open
    patch.setattr(Path, "open", lambda path, *args: opened(Path("/dev/full"), *args))


def full_at_sync(patch):
    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fail)


def signalled(number):
    return lambda patch, model, folder: os.kill(os.getpid(), number)


def broken(patch, model, folder):
    weight = model.net.parts[0].weight
    weight.register_hook(lambda grad: grad * float("nan"))


@dataclass(frozen=True)
class Fault:
    """What happens in a step, what is raised, where the checkpoint stands, and options."""

    action: Callable
    error: type[Exception]
    named: str
    position: tuple[int, int] = (1, 0)
    options: dict = field(default_factory=dict)


FAULTS = {
    "a full disk": Fault(lambda patch, *_: full_in_write(patch), OSError, "could not be written"),
    "a full disk at sync": Fault(lambda patch, *_: full_at_sync(patch), OSError, "intact"),
    "Ctrl-C": Fault(signalled(signal.SIGINT), TrainingInterrupted, "--resume", (1, 2)),
    "SIGTERM": Fault(signalled(signal.SIGTERM), TrainingInterrupted, "--resume", (1, 2)),
    "NaN in a gradient": Fault(broken, NonFiniteLossError, "epoch 2"),
    "NaN, then a checkpoint": Fault(
        broken, NonFiniteLossError, "epoch 2", options={"checkpoint_steps": 2}
    ),
    "no log": Fault(
        lambda patch, model, folder: shutil.rmtree(folder / "logs"), OSError, "log.txt", (2, 0)
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_the_run_goes_on(tmp_path, whole, name):
    fault = FAULTS[name]
    (tmp_path / "logs").mkdir()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        attack = At(STEP, lambda model, _: fault.action(patch, model, tmp_path) and None)
        journal = Journal(tmp_path / "logs" if name == "no log" else None)
        options = {"journal": journal} | fault.options
        with pytest.raises(fault.error, match=fault.named):
            run(tmp_path / "run", perturb=attack, **options)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_goes_on(tmp_path / "run", whole, position=fault.position, **fault.options)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice(*_):
        signal.raise_signal(signal.SIGINT)  # handled before it returns, unlike os.kill
        signal.raise_signal(signal.SIGINT)

    # A shell may have started the tests in the background, where SIGINT is ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, perturb=At(STEP, twice))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert load_checkpoint(tmp_path / "last.pt")["batch"] == 0


STEEP = partial(pgd, eps=0.1, step_size=0.1, steps=1)


@pytest.mark.parametrize(
    "options", [{"perturb": At(1, nan_images)}, {"perturb": STEEP, "lr": 1e30}]
)
def test_without_a_finite_loss_nothing_is_written(tmp_path, options):
    with pytest.raises(NonFiniteLossError, match="lr"):
        run(tmp_path, **options)
    assert not any(tmp_path.iterdir())


def images_by(read):
    """The splits whose training images are what ``read`` makes of them."""
    splits = small_run.splits()
    x, y = splits.train.tensors
    images = FileImages(range(len(y)), y, lambda path: read(x[int(path.name)]))
    return replace(splits, train=images)


@pytest.mark.slow
def test_a_process_that_loads_images_dies(tmp_path, whole):
    """It is killed in the second epoch, which it recognises by the checkpoint of the first."""

    def read(image):
        if get_worker_info() is not None and (tmp_path / "last.pt").exists():
            die()
        return image

    with pytest.raises(ChildProcessError, match="workers"):
        run(tmp_path, data=images_by(read), workers=1)
    assert_goes_on(tmp_path, whole, workers=1)


def test_a_picture_that_cannot_be_read_any_more(tmp_path, whole):
    cut = []

    def read(image):
        if cut:
            raise UnreadableError("7.raw is cut off; replace it")
        return image

    data = images_by(read)
    with pytest.raises(UnreadableError, match="7.raw"):
        run(tmp_path, data=data, perturb=At(STEP, lambda *_: cut.append(True)))
    cut.clear()
    assert_goes_on(tmp_path, whole, data=data)


def one_wrong(label):
    return lambda y: torch.where(torch.arange(len(y)) == 9, label, y)


@pytest.mark.parametrize(
    "spoil",
    [one_wrong(3), one_wrong(-1), one_wrong(-100), torch.Tensor.float, nn.functional.one_hot],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, spoil):
    """On a GPU they would end the process in cross entropy, and -100 would be left out."""
    splits = small_run.splits()
    x, y = splits.train.tensors
    with pytest.raises(ValueError, match="labels"):
        run(tmp_path, data=replace(splits, train=TensorDataset(x, spoil(y))))


def weights_alone(path):
    content = load_checkpoint(path)
    save_checkpoint(path, {"description": content["description"], "model": content["model"]})


SPOILT = {
    "damaged": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "of something else": lambda path: torch.save({"w": torch.zeros(1)}, path),
    "weights alone": weights_alone,
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_run_is_resumed_from_a_file_that_is_none_of_its(tmp_path, whole, name):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    SPOILT[name](folder / "last.pt")
    with pytest.raises(ValueError, match="last.pt"):
        run(folder, resume=True)
    shutil.copy(folder / "best.pt", folder / "last.pt")
    best = load_checkpoint(folder / "best.pt")
    assert_goes_on(folder, whole, position=(best["epoch"], 0))


def test_the_folder_is_deleted_meanwhile(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="run is gone"):
        run(folder, perturb=At(STEP, lambda *_: shutil.rmtree(folder)), checkpoint_steps=2)
