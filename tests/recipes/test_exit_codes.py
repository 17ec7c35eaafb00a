"""What each recipe ends with: 0 after success, 1 if its work failed, 2 after wrong use, 130 after Ctrl-C.

What newcomers get wrong is in test_newcomer_mistakes, wrong inputs of evaluate in test_evaluate_wrong_use.
"""

import importlib
import os
import re
import shlex
import signal
import sys
import threading

import launch
import pytest
from accelerate.state import AcceleratorState
from lab.command_line import run_recipe
from launch import RECIPES


@pytest.fixture
def ended(tmp_path, monkeypatch, capsys):
    """A function that runs a recipe as its script does, and returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        code = 0
        try:
            run_recipe(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code
        finally:
            AcceleratorState._reset_state(True)
        out, err = capsys.readouterr()
        if isinstance(code, str):  # which Python prints, and ends with 1
            code, err = 1, err + code + "\n"
        return code, out, err

    return call


@pytest.mark.parametrize(
    ("name", "arguments", "expected", "reason"),
    [
        *(
            (name, "--output=a --bach-size 4", 2, f"no option --bach-size.* option: python recipes/{name}.py --help")
            for name in RECIPES
        ),
        ("adv_train", "--batch-size 5000", 2, "batch_size must be from 1 to the number of training images"),
        ("adv_train", "--accumulate 3", 2, "batch_size must be a multiple of"),
        ("adv_train", "--layers [nowhere]", 2, "nowhere"),
        ("adv_train", "--channels []", 2, "must begin with a convolution"),
        ("adv_train", "--mode certified --certified-eps -1", 2, "certified_eps must be"),
        ("adv_train", "--mode certified --mixed-precision bf16", 2, "mixed_precision must be no for certified"),
        ("adv_train", "--mode trades --noise-std 0", 2, "noise_std must be finite and > 0"),
        ("adv_train", "--neuron lif --mode at --gain-penalty=-1", 2, "must be >= 0"),
        ("adv_train", "--pretrained nowhere.pt", 1, "nowhere.pt"),
        ("evaluate", "--compare a b", 1, "a does not exist; --compare takes two"),
        ("evaluate", "--suite slow", 2, "slow"),
        ("sweep", "--grid '{roh: [1]}'", 2, "has no option 'roh'"),
        ("sweep", "--base nowhere", 1, "base nowhere does not exist"),
        ("figures", "", 2, "give the folder of a run"),
        ("figures", "--which neuron", 2, "give --output"),
        ("figures", "--which neurons", 2, "--which must be a list of all, neuron"),
        ("figures", "nowhere", 1, "nowhere does not exist; give the folder of a run"),
        ("figures", "--redraw nowhere", 1, "nowhere does not exist; --redraw takes the folder"),
        ("benchmark", "--methods [Brian]", 2, "neuron has no method Brian; it has DLIF cpp"),
        ("benchmark", "--redraw nowhere", 1, r"nowhere holds no \*.csv"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_leaves_no_folder(ended, tmp_path, name, arguments, expected, reason):
    code, _, err = ended(name, *shlex.split(arguments))
    assert code == expected, err
    assert re.fullmatch(f"error: .*{reason}.*\n", err), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_success_is_0(ended, tmp_path):
    assert ended("figures", "--which", "neuron", "--output", "f")[0] == 0
    code, out, err = ended("figures", "--redraw", "f")
    assert (code, err) == (0, "")
    assert "neuron.json drawn as" in out


SLOW = {  # what would take hours, and what is shown when it has begun
    "adv_train": ("--epochs 9999", "epoch 1/9999"),
    "evaluate": ("run/lif_none --suite standard", "suite standard"),
    "sweep": ("--base digits --options '{epochs: 9999}' --grid '{rho: [0]}'", "1 runs in f"),
    "figures": ("run --which intensity --steps 9999", "gaussian at eps"),
    "benchmark": ("--shapes [[4,8,32,8,8]] --rounds 99999 --check false", "measuring neuron"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_ctrl_c_is_130_without_a_traceback(folder, tmp_path, name):
    arguments, begun = SLOW[name]
    (tmp_path / "run").symlink_to(folder / "runs" / "one")
    process = launch.start(name, tmp_path, *shlex.split(arguments), "--output", "f", launcher=())
    limit = threading.Timer(240, process.kill)
    limit.start()
    for line in process.stdout:
        if begun in line:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes in the foreground get it
            break
    _, err = launch.finish(process, code=130)
    limit.cancel()
    assert "Traceback" not in err
    assert "stopped" in err
    assert err.count("\n") == 1, err
