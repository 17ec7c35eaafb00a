"""A training run of a second on made-up images, and all SCENARIOS on two processes."""

import signal
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from spikingjelly.activation_based import functional, layer
from torch import nn
from torch.utils.data import TensorDataset

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel, fgsm, pgd, rfgsm
from sj_robust.data import ImageSplits
from sj_robust.neuron import DLIFNode, fuse
from sj_robust.training import (
    GradientSparsity,
    Journal,
    NonFiniteLossError,
    Objective,
    ThresholdGuarding,
    TrainingInterrupted,
    TrainingPlan,
    train,
    validation,
)

VALIDATION = {"fgsm": partial(fgsm, eps=0.1), "pgd": partial(pgd, eps=0.1, step_size=0.05, steps=2)}
ATTACK = partial(rfgsm, eps=0.1)


def splits(size=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def part(n):
        rows = torch.arange(n)
        y = rows % 3
        x = 0.3 * torch.rand(n, 1, 4, 4, generator=generator, dtype=dtype)
        x[rows, 0, y] += 0.6
        return TensorDataset(x, y)

    return ImageSplits(
        name="stripes",
        train=part(size),
        validation=part(12),
        test=part(12),
        image_shape=(1, 4, 4),
        classes=3,
    )


class Items(torch.utils.data.Dataset):
    """A list as a data set, such as pairs of images with numbers for classes."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Net(nn.Module):
    """No batch norm, whose statistics would differ between processes; dropout on request, which
    draws globally.
    """

    def __init__(self, dropout):
        super().__init__()
        self.parts = nn.Sequential(
            nn.Linear(16, 24),
            DLIFNode(T=3, tau=4.0),
            nn.Dropout(dropout),
            nn.Linear(24, 3),
        )

    def forward(self, x_seq):
        return self.parts(3 * x_seq.flatten(2))


def batch_norm_net(channels=1):
    """Batch norm that runs fused with its neuron where it may, and one in front of it that never
    does.
    """
    net = nn.Sequential(
        layer.Conv2d(channels, 6, 3, padding=1),
        layer.BatchNorm2d(6),
        layer.Conv2d(6, 6, 3, padding=1),
        layer.BatchNorm2d(6, momentum=None),
        DLIFNode(T=3, tau=4.0),
        layer.Flatten(),
        layer.Linear(96, 3),
    )
    functional.set_step_mode(net, "m")
    assert fuse(net).stages == {"3": ("3", "4")}
    return net


def of_nodes(*kinds, **objective):
    """Options of a run whose network has neurons that are built anew."""

    def build():
        nodes = [kind() for kind in kinds]
        net = nn.Sequential(layer.Flatten(), layer.Linear(16, 24), *nodes, layer.Linear(24, 3))
        functional.set_step_mode(net, "m")
        net[1].weight.data.mul_(3)
        return net

    return {"build": build, "objective": {"rho": 0.0} | objective}


def run(
    folder,
    *,
    dtype=torch.float32,
    perturb=ATTACK,
    dropout=0.0,
    resume=False,
    journal=None,
    data=None,
    build=None,
    objective=None,
    attacks=None,
    mixed_precision="no",
    **plan,
):
    """Train as a process does that has just begun; returns history and classifier."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    set_seed(7)
    net = Net(dropout) if build is None else build()
    classifier = SpikingClassifier(net, T=3).to(dtype)
    usual = {
        "epochs": 3,
        "batch_size": 16,
        "lr": 0.1,
        "seed": 3,
    }
    history = train(
        Objective(classifier, **objective or {}),
        splits(dtype=dtype) if data is None else data,
        TrainingPlan(**usual | plan),
        perturb=perturb,
        validation_attacks=VALIDATION if attacks is None else attacks,
        accelerator=accelerator,
        folder=folder,
        journal=journal or Journal(None),
        description={"plan": {name: str(value) for name, value in plan.items()}},
        resume=resume,
    )
    return history, classifier


class PowerCutError(Exception):
    pass


def power_cut(*_, **__):
    raise PowerCutError


class At:
    """The training attack; at one of its calls ``action(model, x_perturbed)`` happens, and may give
    other images.
    """

    def __init__(self, call, action):
        self.call = call
        self.action = action
        self.calls = 0

    def __call__(self, model, x, y, *, generator):
        self.calls += 1
        x_perturbed = ATTACK(model, x, y, generator=generator)
        if self.calls != self.call:
            return x_perturbed
        changed = self.action(model, x_perturbed)
        return x_perturbed if changed is None else changed


def quiet_attack(model, x, y, *, generator):
    """The training attack, in which the processes must not talk to each other."""
    silent = {
        "all_reduce": None,
        "all_gather": None,
        "broadcast": None,
        "all_gather_into_tensor": None,
        "reduce_scatter_tensor": None,
    }
    with patch.multiple(torch.distributed, **silent):
        return ATTACK(model, x, y, generator=generator)


# Options by name. In float64, so that N processes differ from one by rounding alone.
SAME = {"dtype": torch.float64}
WITH_BATCH_NORM = SAME | {"build": batch_norm_net, "epochs": 1, "perturb": quiet_attack}
# Squared, since a difference of 0 where a spike only moved in time has the sign of its rounding
# error.
PENALTIES = [GradientSparsity(0.01, squared=True), ThresholdGuarding(0.1)]
SCENARIOS = {
    "none": SAME | {"perturb": None, "epochs": 1},
    "attack": SAME | {"perturb": quiet_attack, "retraction": 0.01, "epochs": 2},
    "parts": SAME | {"accumulate": 2, "epochs": 1},
    "penalties": SAME | {"objective": {"rho": 0.0, "penalties": PENALTIES}, "epochs": 1},
    "apart": WITH_BATCH_NORM,
    "certified": SAME
    | {
        "epochs": 1,
        "objective": {
            "loss": "certified",
            "certified_eps": 0.05,
            "kappa": 0.2,
            "rho": 0.5,
        },
        "select": "verified",
        "verified": ThreatModel("Linf", 0.02),
    },
}
CUT = SAME | {"checkpoint_steps": 1}


def assert_same_on_both(classifier, history):
    """Running statistics and histories are those of the other process."""
    buffers = [torch.zeros(1).double()]
    buffers += [buffer.flatten().double() for buffer in classifier.buffers()]
    mine = torch.cat(buffers)
    both = [torch.empty_like(mine), torch.empty_like(mine)]
    torch.distributed.all_gather(both, mine)
    assert torch.equal(*both)
    histories = [None, None]
    torch.distributed.all_gather_object(histories, history)
    assert histories[0] == histories[1]


def nan_images(model, x_perturbed):
    return x_perturbed * float("nan")


def terminate(*_):
    signal.raise_signal(signal.SIGTERM)


def main(folder):
    """All scenarios, in each of two processes."""
    validation._BATCH = 5
    for name, options in SCENARIOS.items():
        history, classifier = run(folder / name, **options)
        assert_same_on_both(classifier, history)
    run(folder / "one_to_two", **CUT, resume=True)
    with pytest.raises(PowerCutError):
        run(folder / "two_to_one", **CUT, perturb=At(7, power_cut))
    first_step = 1 if torch.distributed.get_rank() == 1 else None
    with pytest.raises(NonFiniteLossError):
        run(folder / "nan", perturb=At(first_step, nan_images))
    with pytest.raises(TrainingInterrupted):
        run(folder / "signal", perturb=At(first_step, terminate))
