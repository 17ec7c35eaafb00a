"""The recipe evaluate as its tests run it, on a small trained network and on networks of somebody's
own.
"""

import contextlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shlex import split

import launch
import pytest
from evaluation.short_suite import shortened

SMALL = ("--test-limit", "12")
TWO_BATCHES = (*SMALL, "--batch-size", "6")
start = partial(launch.Forked, "evaluate")

OWN = """
import torch
from torch import nn
from spikingjelly.activation_based import neuron
from sj_robust import SpikingClassifier

def build():
    torch.manual_seed(0)
    node = neuron.LIFNode(tau=2.0, step_mode="m")
    return nn.Sequential(nn.Flatten(2), nn.Linear(64, 32), node, nn.Linear(32, 10))

def wrapped():
    return SpikingClassifier(build(), T=3)

def dead():
    net = build()
    nn.init.constant_(net[1].bias, -100.0)
    return net

def wrong_shape():
    return nn.Sequential(nn.Flatten(2), nn.Linear(63, 10))

def five():
    return nn.Sequential(nn.Flatten(2), nn.Linear(64, 5))

def nothing():
    return 3

def needs_a_path(path):
    return build()

def fails():
    raise KeyError("weights of\\nlayer 1")

def half():
    return build().half()

def diverged():
    net = build()
    nn.init.constant_(net[3].bias, float("nan"))
    return net

class Blind(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build()

    def forward(self, x_seq):
        return self.net(x_seq.detach())
"""


def in_process(folder, *options, draws=False):
    """The recipe in this process, with short attacks, and with figures if asked for."""
    with contextlib.nullcontext() if draws else undrawn(), shortened():
        launch.in_process("evaluate", folder, *options)


@contextlib.contextmanager
def undrawn():
    """Within it figures, which take as long as the attacks of a test, are empty files, and none is
    for TensorBoard.
    """

    def savefig(figure, file, **settings):
        (file.write if hasattr(file, "write") else Path(file).write_text)("<svg></svg>")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", savefig)
        patch.setattr("matplotlib.figure.Figure.draw_without_rendering", lambda figure: None)
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_figure", lambda *arguments: None)
        yield


def working_folder(folder):
    """A working folder with a run of two small networks in it, and a module with networks of
    somebody's own.
    """
    quick = split("--epochs 5 --batch-size 32 --test-limit 20 --channels 8 8 --T 3 --judged 0")
    plain = split("--mode none --neuron lif --no-reference --output runs/one")
    with undrawn():
        launch.in_process("adv_train", folder, *quick, *plain)
    two = folder / "runs" / "two"
    for name in ("a", "b"):
        (two / name).mkdir(parents=True)
        (two / name / "best.pt").write_bytes(
            (folder / "runs" / "one" / "lif_none" / "best.pt").read_bytes()
        )
    (folder / "own_net.py").write_text(OWN)
    (folder / "broken.py").write_text("from torch import no_such_name\n")
    (folder / "unfinished.py").write_text("def build(:\n")


def without_times(report):
    """The report as plain data, without what another run cannot repeat."""
    content = asdict(report)
    for row in (*content["rows"], *content["estimators"]):
        row["seconds"] = None
    del content["environment"]
    return content
