"""A training run of a second on made-up images; as a script, small_run.py FOLDER, all SCENARIOS on
two processes.
"""

import signal
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import launch
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from spikingjelly.activation_based import functional, layer
from torch import nn
from torch.utils.data import TensorDataset

from sj_robust import SpikingClassifier
from sj_robust.attacks import fgsm, pgd, rfgsm
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
        y = torch.arange(n) % 3
        x = 0.3 * torch.rand(n, 1, 4, 4, generator=generator, dtype=dtype)
        x[torch.arange(n), 0, y] += 0.6
        return TensorDataset(x, y)

    return ImageSplits("stripes", part(size), part(12), part(12), (1, 4, 4), 3)


class Net(nn.Module):
    """No batch norm, whose statistics would differ between processes; dropout on request, which
    draws globally.
    """

    def __init__(self, dropout):
        super().__init__()
        self.parts = nn.Sequential(
            nn.Linear(16, 24), DLIFNode(T=3, tau=4.0), nn.Dropout(dropout), nn.Linear(24, 3)
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
    **plan,
):
    """Train as a process does that has just begun; returns history and classifier."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    set_seed(7)
    classifier = SpikingClassifier(Net(dropout) if build is None else build(), T=3).to(dtype)
    history = train(
        Objective(classifier, **objective or {}),
        splits(dtype=dtype) if data is None else data,
        TrainingPlan(**{"epochs": 3, "batch_size": 16, "lr": 0.1, "seed": 3} | plan),
        perturb=perturb,
        validation_attacks=VALIDATION if attacks is None else attacks,
        accelerator=accelerator,
        folder=folder,
        journal=Journal(None) if journal is None else journal,
        description={"plan": plan},
        resume=resume,
    )
    return history, classifier


class PowerCutError(Exception):
    pass


def power_cut(*_):
    raise PowerCutError


class At:
    """The training attack; at one of its calls ``action(model, x_perturbed)`` happens, and may give
    other images.
    """

    def __init__(self, call, action):
        self.call, self.action, self.calls = call, action, 0

    def __call__(self, model, x, y, *, generator):
        self.calls += 1
        x_perturbed = ATTACK(model, x, y, generator=generator)
        changed = self.action(model, x_perturbed) if self.calls == self.call else None
        return x_perturbed if changed is None else changed


def quiet_attack(model, x, y, *, generator):
    """The training attack, in which the processes must not talk to each other."""
    names = (
        "all_reduce",
        "all_gather",
        "broadcast",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
    )
    with patch.multiple(torch.distributed, **dict.fromkeys(names)):
        return ATTACK(model, x, y, generator=generator)


# Options by name. In float64, so that N processes differ from one by rounding alone.
SAME = {"dtype": torch.float64}
WITH_BATCH_NORM = SAME | {"build": batch_norm_net, "epochs": 1, "perturb": quiet_attack}
SCENARIOS = {
    "none": SAME | {"perturb": None},
    "attack": SAME | {"perturb": quiet_attack, "retraction": 0.01},
    "parts": SAME | {"accumulate": 2, "epochs": 1},
    "synchronised": WITH_BATCH_NORM | {"sync_batch_norm": True},
    "penalties": WITH_BATCH_NORM
    | {
        "sync_batch_norm": True,
        # Squared, since a difference of 0 where a spike only moved in time has the sign of its
        # rounding error.
        "objective": {
            "rho": 0.0,
            "penalties": [GradientSparsity(0.01, squared=True), ThresholdGuarding(0.1)],
        },
    },
    "apart": WITH_BATCH_NORM,
    "certified": WITH_BATCH_NORM
    | {
        "sync_batch_norm": True,
        "objective": {"loss": "certified", "certified_eps": 0.05, "kappa": 0.2, "rho": 0.5},
        "select": "verified",
        "verified_eps": 0.02,
    },
}
CUT = SAME | {"checkpoint_steps": 1}


def main(folder):
    torch.set_num_threads(1)
    validation._BATCH = 5
    for name, options in SCENARIOS.items():
        history, classifier = run(folder / name, **options)
        buffers = torch.cat(
            [
                torch.zeros(1).double(),
                *(buffer.flatten().double() for buffer in classifier.buffers()),
            ]
        )
        both = [torch.empty_like(buffers) for _ in range(2)]
        torch.distributed.all_gather(both, buffers)
        assert torch.equal(*both), f"{name}: the processes have other running statistics"
        records = [None, None]
        torch.distributed.all_gather_object(records, history)
        assert records[0] == records[1], f"{name}: the processes have other histories"
    run(folder / "one_to_two", **CUT, resume=True)
    with pytest.raises(PowerCutError):
        run(folder / "two_to_one", **CUT, perturb=At(7, power_cut))
    first_step = 1 if torch.distributed.get_rank() == 1 else None
    with pytest.raises(NonFiniteLossError):
        run(folder / "nan", perturb=At(first_step, lambda model, x: x * float("nan")))
    with pytest.raises(TrainingInterrupted):
        run(
            folder / "signal",
            perturb=At(first_step, lambda model, x: signal.raise_signal(signal.SIGTERM)),
        )


if __name__ == "__main__":
    print(*launch.two_processes(partial(main, Path(sys.argv[1]))))
