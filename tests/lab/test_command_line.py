"""Words of a command line, options of resumed runs, exit codes."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from lab.command_line import WrongUse, checked, named_arguments, parse_options, run_recipe, same_names
from lab.command_line.wrong_use import check_values

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
    err = capsys.readouterr().err
    assert err.startswith("error: there is no option --batchsize; did you mean --batch-size?; every option: python ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--batch_size", "many"], "--batch-size must be an integer, got many"),
        (["--batch_size"], "--batch-size needs a value"),
        (["--resume", "maybe"], "--resume must be true or false, got maybe"),
        (["word"], "a bare word means nothing here; write --option VALUE"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_options_are_told_in_a_line(words, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(Options, words, stem)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert reason in err
    assert err.count("\n") == 1


def test_a_file_with_an_unknown_option_is_refused(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("batch_sise: 3\n")
    with pytest.raises(SystemExit) as stop:
        parse_options(Options, ["--config", str(tmp_path / "mine.yaml")], stem)
    assert stop.value.code == 2
    assert "there is no option --batch-sise; did you mean --batch-size?" in capsys.readouterr().err


def test_values_are_checked_with_the_name_of_the_option():
    with pytest.raises(WrongUse, match="batch_size must be >= 1, got 0"):
        parse_options(Options, ["--batch_size", "0"], stem)
    for values, reason in (
        ({"eps": "8/0"}, "eps must be a number or a fraction"),
        ({"step_size": -0.1}, "step_size must be >= 0"),
        ({"eps": [0.1, "x"]}, "got 'x'"),
        ({"dataset": "mnits"}, "dataset must be one of digits, "),
        ({"validation_fraction": 1.0}, "above 0 and below 1, got 1.0"),
    ):
        with pytest.raises(WrongUse, match=reason):
            check_values(SimpleNamespace(**values))
    check_values(SimpleNamespace(eps=["8/255", 0.1], dataset="image_folder:x", T=1, seed=0, rounds=None))


def test_wrong_use_is_a_value_error_that_is_told_apart():
    with pytest.raises(WrongUse, match="no such suite") as error, checked():
        raise ValueError("no such suite")
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(FileNotFoundError), checked():
        raise FileNotFoundError("no data")


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
        (WrongUse("eps must be > 0"), 2, "error: eps must be > 0"),
        (ValueError("the file is damaged"), "error: the file is damaged", ""),
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


def test_what_torch_says_of_triton_is_dropped_and_nothing_else(monkeypatch, capsys):
    """The message that SpikingJelly 2.x's first LIF layer brings about where there is no Triton."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--seed", "1"])
    logger = logging.getLogger("torch._library.triton")
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(handler)
    try:
        logger.warning("Triton not available, find_triton_kernels = []")
        assert len(heard) == 1  # by itself the message is told
        run_recipe(failing(None))
        logger.warning("Triton not available, find_triton_kernels = []")
        logger.warning("reached max recursion depth (%s)", 5)
        logger.error("Triton is broken")
    finally:
        logger.removeHandler(handler)
    assert heard[1:] == ["reached max recursion depth (5)", "Triton is broken"]


def test_the_message_is_still_what_torch_says():
    triton = pytest.importorskip("torch._library.triton", reason="older torch has no such file")
    from sj_robust._host import _TRITON_LOGGER, _TRITON_MESSAGE

    assert triton.__name__ == _TRITON_LOGGER
    text = Path(triton.__file__).read_text(encoding="utf-8")
    assert _TRITON_MESSAGE in text or "find_triton_kernels" not in text
