"""A training run of a second on made-up images, and a script for several processes: small_run.py FOLDER DTYPE MODE."""

import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import TensorDataset

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import fgsm, pgd, rfgsm
from sj_robust.data import ImageSplits
from sj_robust.training import Journal, Objective, TrainingPlan, train

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
    """No batch norm, whose statistics would differ between processes; dropout on request, which draws globally."""

    def __init__(self, dropout):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(16, 24), DLIFNode(T=3, tau=4.0), nn.Dropout(dropout), nn.Linear(24, 3))

    def forward(self, x_seq):
        return self.parts(3 * x_seq.flatten(2))


def run(folder, *, dtype=torch.float32, perturb=ATTACK, dropout=0.0, resume=False, journal=None, data=None, **plan):
    """Train; returns history and classifier."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True)
    set_seed(7)
    classifier = SpikingClassifier(Net(dropout), T=3).to(dtype)
    history = train(
        Objective(classifier),
        splits(dtype=dtype) if data is None else data,
        TrainingPlan(**{"epochs": 3, "batch_size": 16, "lr": 0.1, "seed": 3} | plan),
        perturb=perturb,
        validation_attacks=VALIDATION,
        accelerator=accelerator,
        folder=folder,
        journal=Journal(None) if journal is None else journal,
        description={"plan": plan},
        resume=resume,
    )
    return history, classifier


if __name__ == "__main__":
    torch.set_num_threads(1)
    attack = {"none": None, "at": partial(rfgsm, eps=0.1, noise_std=0.0)}[sys.argv[3]]
    run(sys.argv[1], dtype=getattr(torch, sys.argv[2]), perturb=attack)
    if torch.distributed.is_initialized():  # a process that leaves early aborts the others
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
