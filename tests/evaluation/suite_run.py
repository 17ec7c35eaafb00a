"""An evaluation of a second on made-up images, also killed after some steps or run by two
processes.
"""

import json
import os
import signal
from functools import partial

import launch
import torch
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import fgsm, gaussian, pgd
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation import Member
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.identity import network_key
from sj_robust.evaluation.run.loop import Asked, run
from sj_robust.evaluation.run.member import Variant
from sj_robust.evaluation.run.progress import Watch

EPS = 0.1
THREAT = ThreatModel("Linf", EPS)


def images(n=20):
    """Three classes of 4x4 images, a bright pixel each."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = 0.6 * torch.rand(n, 1, 4, 4, generator=generator)
    x[torch.arange(n), 0, y] += 0.25
    return x, y


def batches(size=6, n=20):
    x, y = images(n)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, n, size)]


class Net(nn.Module):
    """A spiking network that tells the classes apart, without training."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.parts = nn.Sequential(nn.Linear(16, 24), DLIFNode(T=3, tau=4.0), nn.Linear(24, 3))
        rows = torch.eye(3, 4).repeat_interleave(4, 1)  # of each class the pixels of one row
        with torch.no_grad():
            self.parts[0].weight.copy_(
                rows.repeat(8, 1) + 0.2 * torch.randn(24, 16, generator=generator)
            )
            self.parts[0].bias.fill_(-1.0)
            self.parts[2].weight.copy_(torch.eye(3).repeat(1, 8))
            self.parts[2].bias.zero_()

    def forward(self, x_seq):
        return self.parts(x_seq.flatten(2))


def classifier():
    return SpikingClassifier(Net(), T=3)


def members():
    step = partial(pgd, eps=EPS, step_size=EPS / 3, steps=4)
    return (
        Member("fgsm", partial(fgsm, eps=EPS), group=""),
        Member("gaussian", partial(gaussian, std=EPS), group=""),
        Member("pgd/r0", step),
        Member("pgd/r1", step, seed=1),
        Member("control/r0", step, group="control"),
        Member("control/r1", partial(step, restarts=2), group="control"),
    )


def suite_outcome(
    model, given, suite, *, folder=None, threat=THREAT, seed=0, draws=1, verified=(), on_step=None
):
    """The loop over the members of one suite on batches."""
    data = Data.of(given)
    return run(
        model,
        data,
        [Variant(suite, seed=seed)],
        asked=Asked(threat, draws, frozenset(verified)),
        network=network_key(model, data, folder),
        folder=folder,
        watch=Watch(on_step=on_step),
    )


def outcome_of(folder=None, *, size=6, net=None, suite=None, data=None, **options):
    arguments = {"seed": 3} | options
    given = batches(size) if data is None else data
    suite = members() if suite is None else suite
    return suite_outcome(net or classifier(), given, suite, folder=folder, **arguments)


def without_times(outcome):
    """Plain data that must not change by an interruption."""
    rows = [{**vars(row), "threat": repr(row.threat), "seconds": None} for row in outcome.rows]
    return json.loads(json.dumps([rows, outcome.potential]))


def die_at(step):
    """Kill this process for good once so many steps are done."""

    def watch(position):
        if position.done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return watch


def killed_at(folder, steps):
    """Exit codes of runs into a folder per step, each killed once it has done so many."""
    runs = [partial(outcome_of, folder / str(n), on_step=die_at(n)) for n in steps]
    return launch.forked(*runs)


def in_two_processes(folder, *, killed_at=None):
    """Exit codes of both; what they find is then in outcome.json."""

    def work():
        outcome = outcome_of(folder, on_step=None if killed_at is None else die_at(killed_at))
        if torch.distributed.get_rank() == 0:
            (folder / "outcome.json").write_text(json.dumps(without_times(outcome)))

    return launch.two_processes(work)
