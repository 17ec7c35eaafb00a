"""Words of a command line, options of resumed runs, exit codes."""

import sys
from dataclasses import dataclass

import pytest
import yaml

from sj_robust.command_line import named_arguments, parse_options, run_recipe, same_names
from sj_robust.training import NonFiniteLossError, TrainingInterrupted


@dataclass(frozen=True)
class Options:
    """Options of a recipe.

    Attributes:
        batch_size: Images per step.
        name: A name.
        output: Folder.
        resume: Whether to go on.
    """

    batch_size: int = 64
    name: str = "digits"
    output: str | None = None
    resume: bool = False


def stem(options):
    return options.name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch-size", "4"], ["--batch_size", "4"]),
        (["--batch-size=4"], ["--batch_size=4"]),
        (["--name", "a-b"], ["--name", "a-b"]),
        (["--name=--a-b"], ["--name=--a-b"]),
        (["--resume"], ["--resume=true"]),
        (["--resume", "--name", "x"], ["--resume=true", "--name", "x"]),
        (["--download", "--trust-code", "--report"], ["--download=true", "--trust_code=true", "--report=true"]),
        (
            ["--compile", "--input-gain", "--sync-batch-norm"],
            ["--compile=true", "--input_gain=true", "--sync_batch_norm=true"],
        ),
        (["--resume", "false"], ["--resume", "false"]),
        (["--resume", "runs/x"], ["--resume=true", "runs/x"]),
    ],
)
def test_named_arguments(words, expected):
    given = list(words)
    assert named_arguments(words) == expected
    assert words == given


def test_options_from_the_command_line():
    assert parse_options(Options, ["--batch_size", "4"], stem) == Options(batch_size=4)


def test_an_unknown_option_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(Options, ["--batchsize", "4"], stem)
    assert stop.value.code == 2
    assert "batchsize" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_options_but_for_those_given_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, batch_size, mark in ((1, 5, True), (2, 6, True), (3, 7, False)):
        folder = tmp_path / "runs" / f"digits-{number}"
        (folder / "network").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"batch_size": batch_size, "name": "kept"}))
        if mark:
            (folder / "network" / "last.pt").touch()
    resumed = parse_options(Options, ["--resume=true"], stem)
    assert resumed == Options(6, "kept", "runs/digits-2", True)
    resumed = parse_options(Options, ["--resume=true", "--output", "runs/digits-1", "--batch_size", "9"], stem)
    assert resumed == Options(9, "kept", "runs/digits-1", True)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        parse_options(Options, ["--resume=true", "--name", "other"], stem)


def failing(error):
    def main(arguments):
        assert arguments == ["--seed", "1"]
        if error is not None:
            raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "continue with --resume"),
        (TrainingInterrupted(15, "last.pt"), 143, "SIGTERM"),
        (ValueError("eps must be > 0"), "error: eps must be > 0", ""),
        (FileNotFoundError("no data"), "error: no data", ""),
        (NonFiniteLossError("the loss is not finite"), "error: the loss is not finite", ""),
    ],
)
def test_exit_codes(error, code, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--seed", "1"])
    with pytest.raises(SystemExit) as stop:
        run_recipe(failing(error))
    assert stop.value.code == code
    assert text in capsys.readouterr().err


def test_a_recipe_that_ends_well_and_one_with_a_fault_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--seed", "1"])
    run_recipe(failing(None))
    with pytest.raises(ZeroDivisionError):
        run_recipe(failing(ZeroDivisionError()))


def test_same_names_takes_nothing_else():
    def target(x, *, batch_size=1, other=2):
        return x, batch_size, other

    assert same_names(target, Options()) == {"batch_size": 64}
