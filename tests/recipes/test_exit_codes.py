"""What each recipe ends with: 0 after success, 1 if its work failed, 2 after wrong use, 130 after
Ctrl-C; wrong use is in test_misuse.
"""

import errno
import importlib
import importlib.util
import io
import os
import shlex
import signal
import sys
import threading
from shlex import split

import launch
import pytest
from lab.command_line import run_recipe

from sj_robust.core.saved import write_whole
from sj_robust.evaluation.run.progress import Progress, Step


@pytest.mark.parametrize(
    ("name", "file", "content", "named"),
    [
        ("adv_train", "config.yaml", "model: own.py:build", "--resume --model own.py:build"),
        (
            "evaluate",
            "config.yaml",
            "{network: 'own.py:build', T: 2, eps: 0.1}",
            "--resume --network own.py:build",
        ),
        (
            "evaluate",
            "config.yaml",
            "{checkpoint: x.pt, trust_code: true}",
            "--resume --trust-code",
        ),
        ("sweep", "sweep.yaml", "{base: digits, recipe: own.py}", "--report --recipe own.py"),
        (
            "sweep",
            "sweep.yaml",
            "{base: f/base.yaml}",
            """--report --options '{"model": "own.py:build"}'""",
        ),
    ],
)
def test_code_that_a_folder_names_is_run_if_the_command_names_it_too(
    ended, tmp_path, name, file, content, named
):
    (tmp_path / "own.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / file).write_text(content)
    (tmp_path / "f" / "base.yaml").write_text("model: own.py:build")
    words = shlex.split(named)
    code, _, err = ended(name, "--output", "f", words[0])
    found = (code, (tmp_path / "ran").exists())
    assert found == (2, False), err
    assert f"if you trust it, name it here as well: {named.split(' ', 1)[1]}" in err
    code, _, err = ended(name, "--output", "f", *words)
    assert "if you trust it" not in err
    assert (tmp_path / "ran").exists() == ("own.py" in content)


def test_a_full_disk_is_told_with_file_and_remedy(monkeypatch, tmp_path):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def main(arguments):
        with progress.batch(0) as log:
            log.append(Step("pgd", seen=[0], fell=[]))

    progress = Progress(tmp_path, {})
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    with pytest.raises(
        SystemExit, match=r"'.*batch-000000\.jsonl'; free some space there: continue with --resume"
    ):
        run_recipe(main)
    with pytest.raises(SystemExit, match=r"'.*report\.json'; free some space"):
        run_recipe(lambda arguments: write_whole(tmp_path / "report.json", "{}"))


def test_a_missing_extra_is_told_in_a_line(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name)
    )
    monkeypatch.delitem(sys.modules, "sj_robust.core.recipes_installed")
    with pytest.raises(SystemExit, match=r"error: .* extra 'recipes', but scipy .*: pip install"):
        importlib.reload(sys.modules["lab.command_line"])


@pytest.mark.slow
def test_success_is_0(ended, tmp_path):
    assert ended(*split("figures --which neuron --output f"))[0] == 0
    code, out, err = ended(*split("figures --redraw f"))
    assert (code, err) == (0, "")
    assert "neuron.json drawn as" in out


SLOW = {  # what would take hours, and what is shown when it has begun
    "adv_train": ("--epochs 9999", "epoch 1/9999"),
    "evaluate": ("run/lif_none --suite standard --test-limit 12", "suite standard: "),
    "sweep": ("--base digits --options '{epochs: 9999}' --grid '{rho: [0]}'", "1 runs in f"),
    "benchmark": ("--shapes [[4,8,32,8,8]] --rounds 99999 --no-check", "measuring neuron"),
}


def assert_stopped(code, err):
    assert code == 130, err
    assert "Traceback" not in err
    assert "stopped" in err
    # torch may say that there is a compiler for CUDA and no GPU
    said = [line for line in err.splitlines() if "torch/utils/cpp_extension.py" not in line]
    assert len(said) == 1, err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adv_train", "sweep"])
def test_ctrl_c_ends_a_process_and_its_children_without_a_traceback(tmp_path, name):
    arguments, begun = SLOW[name]
    process = launch.Forked(name, tmp_path, *shlex.split(arguments), "--output", "f")
    limit = threading.Timer(240, process.kill)
    limit.start()
    for line in process.stdout:
        if begun in line:
            # as a terminal does: all processes in the foreground get it
            os.killpg(process.pid, signal.SIGINT)
            break
    _, err = launch.finish(process, code=130)
    limit.cancel()
    assert_stopped(process.returncode, err)


class Interrupts(io.StringIO):
    """A terminal at which Ctrl-C is pressed as soon as a text is shown."""

    def __init__(self, begun):
        super().__init__()
        self.begun = begun

    def write(self, text):
        super().write(text)
        if self.begun in text:
            signal.raise_signal(signal.SIGINT)
        return len(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "benchmark"])
def test_ctrl_c_is_130_without_a_traceback(ended, folder, tmp_path, monkeypatch, name):
    arguments, begun = SLOW[name]
    (tmp_path / "run").symlink_to(folder / "runs" / "one")
    monkeypatch.setattr(sys, "stdout", Interrupts(begun))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, err = ended(name, *shlex.split(arguments), "--output", "f")
    finally:
        signal.signal(signal.SIGINT, before)
    assert_stopped(code, err)
