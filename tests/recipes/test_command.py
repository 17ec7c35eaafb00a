"""``sj-robust COMMAND`` runs the same files as the scripts, and shows itself in their place."""

import os
import re
import sys

import pytest
from lab.command_line import describe_folder, run_recipe
from launch import RECIPES, unboxed

from sj_robust import __main__ as command
from sj_robust import __main__ as commands
from sj_robust.__main__ import COMMANDS, as_called


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """A function that runs a command as the console does; returns its exit code, and what it said
    on stdout and stderr.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(commands._VARIABLE, "")  # which is taken back then
    monkeypatch.delenv(commands._VARIABLE)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["sj-robust", *words])
        code = 0
        try:
            command.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_every_recipe_has_a_command():
    assert {one.recipe for one in COMMANDS.values()} == {*RECIPES, ""}
    for name in RECIPES:
        assert (commands.RECIPES / f"{name}.py").is_file()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("", 0, "usage: sj-robust COMMAND .* doctor .* pip install 'sj_robust\\[recipes\\]'"),
        ("--help", 0, "usage: sj-robust COMMAND .* leaderboard"),
        ("--version", 0, r"sj_robust \d"),
        ("trian", 2, "error: there is no command trian; there are train, evaluate"),
        ("doctor --help", 0, "usage: sj-robust doctor"),
        ("doctor now", 2, "error: doctor takes no options, got now"),
        ("train --epoch 3", 2, "Unrecognized options: --epoch"),
        ("train --config nowhere", 2, "error: nowhere must be .* a preset, such as digits"),
        ("train --config digits --print-config", 0, "dataset: digits"),
        ("train --config certified/mnist_0.1 --print-config", 0, "mode: certified"),
        ("sweep --sweep sweeps/digits_sweep --print-config", 0, "grid:"),
        ("compare a --print-config", 0, "compare: - a"),
        ("leaderboard a b --print-config", 0, "leaderboard: - a - b"),
    ],
)
def test_a_command_is_its_recipe_and_a_preset_is_found_by_name(said, words, code, told):
    found, out, err = said(*words.split())
    assert found == code, err
    assert re.search(told, unboxed(out + err))


def test_folders_errors_and_launchers_name_the_command(said, tmp_path):
    said("train", "--print-config")
    assert commands._VARIABLE in os.environ  # as the processes that it starts find it
    describe_folder(tmp_path, "adv_train", ["--config", "recipes/configs/certified/mnist_0.1.yaml"])
    text = (tmp_path / "README.md").read_text()
    assert "sj-robust train --config certified/mnist_0.1\n" in text
    assert f"`sj-robust train --output {tmp_path} --resume`" in text
    assert "recipes/" not in text
    launched = as_called("torchrun --nproc-per-node 2 recipes/evaluate.py CHECKPOINT")
    assert launched == "torchrun --nproc-per-node 2 -m sj_robust evaluate CHECKPOINT"
    assert as_called("python recipes/own.py") == "python recipes/own.py"

    def fails(arguments):
        raise FileNotFoundError("give a run of recipes/adv_train.py")

    with pytest.raises(SystemExit, match="give a run of sj-robust train"):
        run_recipe(fails)


def test_the_doctor_runs(said):
    code, out, _ = said("doctor")
    assert code == 0
    assert "self test cpu" in out
