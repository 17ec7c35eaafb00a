"""The recipe evaluate as its tests run it, on a small trained network and on networks of somebody's own."""

import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import launch
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "evaluate.py"
SMALL = ("--test-limit", "12", "--batch-size", "6")
sys.path.insert(0, str(RECIPE.parent))
import adv_train  # noqa: E402  # a script, found only now
import evaluate  # noqa: E402  # as above

STRICT = ("-W", "error", "-W", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}

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

def pictures():
    return nn.Sequential(nn.Flatten(2), nn.Linear(192, 2))

class Blind(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build()

    def forward(self, x_seq):
        return self.net(x_seq.detach())
"""


def working_folder(folder):
    """A working folder with a run of two small networks in it, and a module with networks of somebody's own."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        quick = ("--epochs", "5", "--batch-size", "32", "--test-limit", "20", "--channels", "[8,8]", "--T", "3")
        adv_train.main([*quick, "--mode", "none", "--neuron", "lif", "--reference", "false", "--output", "runs/one"])
        AcceleratorState._reset_state(True)
    finally:
        os.chdir(here)
    two = folder / "runs" / "two"
    for name in ("a", "b"):
        (two / name).mkdir(parents=True)
        (two / name / "best.pt").write_bytes((folder / "runs" / "one" / "lif_none" / "best.pt").read_bytes())
    (folder / "own_net.py").write_text(OWN)
    (folder / "broken.py").write_text("from torch import no_such_name\n")
    (folder / "unfinished.py").write_text("def build(:\n")


in_process = partial(launch.in_process, evaluate.main)


def start(folder, *options, launcher=()):
    command = [sys.executable, *STRICT, *launcher, str(RECIPE), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, preexec_fn=launch.hears_ctrl_c, **pipes)


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def without_times(report):
    """The report as plain data, without what another run cannot repeat."""
    content = asdict(report)
    for row in (*content["members"], *content["estimators"]):
        row["seconds"] = None
    del content["environment"]
    return content
