"""The recipe evaluate as its tests run it, on a small trained network and on networks of somebody's own."""

import contextlib
from dataclasses import asdict
from functools import partial

import launch
import pytest

SMALL = ("--test-limit", "12", "--batch-size", "6")
start = partial(launch.start, "evaluate")

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
    """The recipe in this process; figures, which take as long as the attacks, are empty files unless asked for."""
    with pytest.MonkeyPatch.context() as patch:
        if not draws:
            patch.setattr("matplotlib.figure.Figure.savefig", _blank)
        launch.in_process("evaluate", folder, *options)


def _blank(figure, file, **settings):
    with contextlib.nullcontext(file) if hasattr(file, "write") else open(file, "w") as to:
        to.write("<svg></svg>")


def working_folder(folder):
    """A working folder with a run of two small networks in it, and a module with networks of somebody's own."""
    quick = ("--epochs", "5", "--batch-size", "32", "--test-limit", "20", "--channels", "[8,8]", "--T", "3")
    plain = ("--mode", "none", "--neuron", "lif", "--reference", "false", "--output", "runs/one")
    launch.in_process("adv_train", folder, *quick, *plain)
    two = folder / "runs" / "two"
    for name in ("a", "b"):
        (two / name).mkdir(parents=True)
        (two / name / "best.pt").write_bytes((folder / "runs" / "one" / "lif_none" / "best.pt").read_bytes())
    (folder / "own_net.py").write_text(OWN)
    (folder / "broken.py").write_text("from torch import no_such_name\n")
    (folder / "unfinished.py").write_text("def build(:\n")


def without_times(report):
    """The report as plain data, without what another run cannot repeat."""
    content = asdict(report)
    for row in (*content["members"], *content["estimators"]):
        row["seconds"] = None
    del content["environment"], content["verified_seconds"]
    return content
