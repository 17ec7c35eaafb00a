"""Options declared once, words of a command line, options of resumed runs, exit codes."""

import logging
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml
from lab.command_line import (
    WrongUse,
    check_options,
    checked,
    deciding,
    describe_folder,
    idle,
    option,
    parse_options,
    read_options,
    run_recipe,
)
from lab.command_line.declared import (
    AtLeastTwo,
    DatasetName,
    OpenUnitInterval,
    PositiveInt,
    Radius,
    options_of,
)

from sj_robust.training import NonFiniteLossError, TrainingInterrupted


@dataclass(frozen=True)
class Options:
    """Options of a recipe."""

    network: str | None = option(None, "A network.", group="what", positional=True)
    batch_size: PositiveInt = option(64, "Images per step.")
    name: str = option("digits", "A name.")
    rounds: AtLeastTwo | None = option(None, "Rounds.")
    share: OpenUnitInterval = option(0.1, "A share.")
    sizes: list[Radius] = option(["0.1"], "Sizes.")
    eps: Radius | None = option(None, "A radius.", decides="figures")
    dataset: DatasetName | None = option(None, "Images.")
    mode: Literal["none", "at", "trades"] = option("at", "The mode.")
    beta: float = option(0.5, "A weight.")
    rho: float = option(1.0, "A weight.")
    norm: Literal["l1", "l2"] = option("l2", "A norm.", idle=lambda options: options.rho == 0)
    project: bool = option(True, "Whether.")
    output: str | None = option(None, "Folder.", group="output", decides="nothing")
    resume: bool = option(False, "Whether to go on.", decides="nothing")


@dataclass(frozen=True)
class Bare:
    """Options without a positional one."""

    resume: bool = option(False, "Whether to go on.")


def stem(options):
    return options.name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch-size", "4"], {"batch_size": 4}),
        (["--batch-size=4"], {"batch_size": 4}),
        (["--name", "a-b"], {"name": "a-b"}),
        (["--name=--a-b"], {"name": "--a-b"}),
        (["--resume", "--name", "x"], {"resume": True, "name": "x"}),
        (["--no-project", "--no-resume"], {"project": False, "resume": False}),
        (["--resume", "false"], {"resume": False}),
        (["--resume", "runs/x"], {"resume": True, "network": "runs/x"}),
        (["--sizes", "0.1", "8/255", "--resume"], {"sizes": [0.1, "8/255"], "resume": True}),
        (["--sizes", "[0.1, 8/255]"], {"sizes": [0.1, "8/255"]}),
        (
            ["--eps", "8/255", "x", "--rounds", "2", "--rho", "2"],
            {"network": "x", "eps": "8/255", "rounds": 2, "rho": 2.0},
        ),
        (["--dataset=image_folder:x"], {"dataset": "image_folder:x"}),
    ],
)
def test_options_from_the_command_line(words, expected):
    given = list(words)
    read = read_options(Options, words)
    assert read == Options(**expected)
    assert {type(value) for value in vars(read).values()} <= {
        str,
        int,
        float,
        bool,
        list,
        type(None),
    }
    assert words == given


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--batchsize", "4"], "there is no option --batchsize; did you mean --batch-size?"),
        (["--batch-size", "many"], "--batch-size must be an integer > 0, got many"),
        (["--batch-size", "-1"], "--batch-size must be an integer > 0, got -1"),
        (["--batch-size"], "--batch-size needs a value"),
        (["--rounds", "1"], "--rounds must be an integer >= 2, got 1"),
        (["--share", "1.0"], "--share must be a number > 0 and < 1, got 1.0"),
        (["--mode", "maybe"], "--mode must be one of none, at, trades, got maybe"),
        (["--eps", "8/0"], "eps must be a number or a fraction such as 8/255, got '8/0'"),
        (["--eps=-0.1"], "eps must be >= 0 and finite, got -0.1"),
        (["--sizes", "0.1", "x"], "sizes must be a number or a fraction such as 8/255, got 'x'"),
        (["--dataset", "mnits"], "dataset must be one of digits, "),
        (["--resume=maybe"], "--resume must be true or false, got maybe"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["a", "b"], "one network at a time, got another one, b"),
    ],
)
def test_wrong_options_are_told_in_a_line_with_code_2(words, reason, capsys):
    with pytest.raises(WrongUse) as refused:
        parse_options(Options, words, stem)
    assert reason in str(refused.value)
    with pytest.raises(SystemExit) as stop:
        check_options(Options, words)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {refused.value}\n"


def test_a_bare_word_needs_an_option_that_takes_it():
    with pytest.raises(WrongUse, match="a bare word means nothing here; write --option VALUE"):
        read_options(Bare, ["word"])


def test_wrong_use_is_a_value_error_that_is_told_apart():
    with pytest.raises(WrongUse, match="no such suite") as error, checked():
        raise ValueError("no such suite")
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(FileNotFoundError), checked():
        raise FileNotFoundError("no data")


def test_what_an_option_decides_and_when_it_decides_nothing():
    assert deciding(Options(), "figures", "nothing") == {
        "eps": None,
        "output": None,
        "resume": False,
    }
    assert "rho" in deciding(Options(), "result")
    assert idle(Options()) == {"beta"}  # of mode at, by the table of modes
    assert idle(Options(mode="trades", rho=0.0)) == {"beta", "project", "norm"}
    assert [one.name for one in options_of(Options) if one.group] == ["network", "output"]


def test_a_resumed_run_keeps_its_options_but_for_those_given_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, batch_size, mark in ((1, 5, True), (2, 6, True), (3, 7, False)):
        folder = tmp_path / "runs" / f"digits-{number}"
        (folder / "network").mkdir(parents=True)
        (folder / "config.yaml").write_text(
            yaml.safe_dump({"batch_size": batch_size, "name": "kept"})
        )
        if mark:
            (folder / "network" / "last.pt").touch()
    resumed = parse_options(Options, ["--resume"], stem)
    assert resumed == Options(batch_size=6, name="kept", output="runs/digits-2", resume=True)
    resumed = parse_options(
        Options, ["--resume", "--output", "runs/digits-1", "--batch-size", "9"], stem
    )
    assert resumed == Options(batch_size=9, name="kept", output="runs/digits-1", resume=True)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        parse_options(Options, ["--resume", "--name", "other"], stem)


def test_a_readme_keeps_the_commands_that_came_before(tmp_path):
    for words in (["--which", "neuron"], ["--which", "gains"], ["--which", "neuron"]):
        describe_folder(tmp_path, "figures", words)
    text = (tmp_path / "README.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("python ")] == [
        "python recipes/figures.py --which neuron",
        "python recipes/figures.py --which gains",
    ]


@pytest.fixture
def run_failing(monkeypatch):
    """A function that runs a recipe which raises an error, or ends well."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--seed", "1"])

    def run(error=None):
        def main(arguments):
            assert arguments == ["--seed", "1"]
            if error is not None:
                raise error

        run_recipe(main)

    return run


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
def test_exit_codes(run_failing, error, code, text, capsys):
    with pytest.raises(SystemExit) as stop:
        run_failing(error)
    assert stop.value.code == code
    assert text in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a fault of its own
        run_failing(ZeroDivisionError())


def test_what_torch_says_of_triton_is_dropped_and_nothing_else(run_failing, monkeypatch):
    """SpikingJelly 2.x's first LIF layer brings it about where there is no Triton; test_terminal
    runs one.
    """
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
        run_failing()
        logger.warning("Triton not available, find_triton_kernels = []")
        logger.warning("reached max recursion depth (%s)", 5)
        logger.error("Triton is broken")
    finally:
        logger.removeHandler(handler)
    assert heard[1:] == ["reached max recursion depth (5)", "Triton is broken"]
