"""What each recipe ends with: 0 after success, 1 if its work failed, 2 after wrong use, 130 after Ctrl-C."""

import importlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import launch
import pytest
from accelerate.state import AcceleratorState
from lab.command_line import run_recipe

ROOT = Path(__file__).parents[2]
RECIPES = ("adv_train", "evaluate", "sweep", "figures", "benchmark")
sys.path.insert(0, str(ROOT / "recipes"))
TINY = "--epochs 1 --train-limit 130 --test-limit 8 --channels [2,2] --T 2 --reference false"


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


def one_line(err):
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_option_is_2(ended, tmp_path, name):
    code, out, err = ended(name, "--output=a", "--bach-size", "4")
    assert (code, out) == (2, "")
    assert "there is no option --bach-size" in one_line(err)
    assert f"every option: python recipes/{name}.py --help" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("adv_train", "--epochs 0", "--epochs must be an integer > 0, got 0"),
        ("adv_train", "--eps 8", "eps must be"),
        ("adv_train", "--batch-size 5000", "batch_size must be from 1 to the number of training images"),
        ("adv_train", "--accumulate 3", "batch_size must be a multiple of"),
        ("adv_train", "--layers [nowhere]", "nowhere"),
        ("adv_train", "--model nothing", "nothing"),
        ("adv_train", "--channels []", "must begin with a convolution"),
        ("adv_train", "--mode trades --noise-std 0", "noise_std must be finite and > 0"),
        ("adv_train", "--neuron lif --mode at --gain-penalty=-1", "must be >= 0"),
        ("evaluate", "", "give a checkpoint"),
        ("sweep", "", "nothing to run"),
        ("sweep", "--grid '{roh: [1]}'", "has no option 'roh'"),
        ("figures", "", "give the folder of a run"),
        ("figures", "--which neuron", "give --output"),
        ("figures", "--which neurons", "--which must be a list of all, neuron"),
        ("benchmark", "--methods [Brian]", "neuron has no method Brian; it has DLIF cpp"),
    ],
)
def test_wrong_use_is_2_and_leaves_no_folder(ended, tmp_path, name, arguments, reason):
    code, _, err = ended(name, *shlex.split(arguments))
    assert code == 2, err
    assert reason in one_line(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        (
            "adv_train",
            ["--dataset", "fashion_mnist", "--data-root", "nowhere"],
            "apt-get install dataset-fashion-mnist",
        ),
        ("adv_train", ["--resume"], "no run to resume"),
        ("adv_train", ["--pretrained", "nowhere.pt"], "nowhere.pt"),
        ("evaluate", ["nowhere.pt"], "nowhere.pt does not exist"),
        ("evaluate", ["--compare", "a", "b"], "a does not exist"),
        ("sweep", ["--base", "nowhere"], "base nowhere does not exist"),
        ("figures", ["nowhere"], "nowhere does not exist"),
        ("figures", ["--redraw", "nowhere"], "nowhere does not exist"),
        ("benchmark", ["--redraw", "nowhere"], "nowhere holds no *.csv"),
    ],
)
def test_a_missing_file_is_1_and_leaves_no_folder(ended, tmp_path, name, arguments, reason):
    code, _, err = ended(name, *arguments)
    assert code == 1, err
    assert err.startswith("error: ")
    assert reason in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_success_is_0(ended, tmp_path):
    assert ended("figures", "--which", "neuron", "--output", "f")[0] == 0
    code, out, err = ended("figures", "--redraw", "f")
    assert (code, err) == (0, "")
    assert "neuron.json drawn as" in out


SLOW = {
    "adv_train": ["--epochs", "9999", "--output", "f"],
    "evaluate": ["run/dlif_at", "--suite", "standard", "--output", "f"],
    "sweep": ["--base", "digits", "--options", "{epochs: 9999}", "--grid", "{rho: [0]}", "--output", "f"],
    "figures": ["run", "--which", "intensity", "--steps", "9999", "--output", "f"],
    "benchmark": ["--shapes", "[[4,8,32,8,8]]", "--rounds", "99999", "--check", "false", "--output", "f"],
}
BEGUN = {
    "adv_train": "epoch 1/9999",
    "evaluate": "suite standard",
    "sweep": "1 runs in f",
    "figures": "gaussian at eps",
    "benchmark": "measuring neuron",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a network in ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    adv_train = importlib.import_module("adv_train")
    adv_train.main([*TINY.split(), "--output", str(folder / "run")])
    AcceleratorState._reset_state(True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_ctrl_c_is_130_without_a_traceback(trained, tmp_path, name):
    (tmp_path / "run").symlink_to(trained / "run")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *SLOW[name]], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=launch.hears_ctrl_c,
    )  # fmt: skip
    limit = threading.Timer(240, process.kill)
    limit.start()
    for line in process.stdout:
        if BEGUN[name] in line:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes in the foreground get it
            break
    _, err = process.communicate()
    limit.cancel()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopped" in err
    assert err.count("\n") == 1, err
