"""Options declared once, words of a command line, options of resumed runs, exit codes."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import yaml
from lab.command_line import (
    AtLeastTwo,
    DatasetName,
    Decides,
    Idle,
    Often,
    OpenUnitInterval,
    PositiveInt,
    Radius,
    WrongUse,
    Yaml,
    YamlDict,
    check_options,
    checked,
    deciding,
    describe_folder,
    idle,
    parse_options,
    plain,
    read_options,
    run_recipe,
    texts_of,
)
from launch import unboxed
from tyro.conf import Positional

from sj_robust.training import NonFiniteLossError, TrainingInterrupted


@dataclass(frozen=True)
class Options:
    """Options of a recipe."""

    network: Annotated[str | None, Positional] = None
    batch_size: Annotated[PositiveInt, Often()] = 64
    """Images per step, of which there are many, so that this text takes more than one line; it is
    one paragraph all the same."""
    name: str = "digits"
    rounds: AtLeastTwo | None = None
    share: OpenUnitInterval = 0.1
    sizes: tuple[Radius, ...] = (Radius(0.1),)
    eps: Annotated[Radius | None, Decides("figures")] = None
    dataset: DatasetName | None = None
    mode: Literal["none", "at", "trades"] = "at"
    beta: float = 0.5
    rho: float | None = 1.0
    norm: Annotated[Literal["l1", "l2"], Idle(lambda options: options.rho == 0)] = "l2"
    layers: Literal["last"] | list[str] = "last"
    seeds: Annotated[int | list[int], Yaml(int, list)] = 1
    tree: YamlDict = field(default_factory=dict)
    augment: bool | None = None
    project: bool = True
    output: Annotated[str | None, Decides("nothing")] = None
    resume: Annotated[bool, Decides("nothing")] = False


@dataclass(frozen=True)
class Trained:
    """An option that a checkpoint keeps."""

    eps: Radius = Radius(0.1)


def stem(options):
    return options.name


EPS = Radius("8/255")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--batch-size 4", {"batch_size": 4}),
        ("--batch_size=4", {"batch_size": 4}),
        ("--batch-size 4 --batch-size 5", {"batch_size": 5}),
        ("--name=--a-b", {"name": "--a-b"}),
        ("--resume --name x", {"resume": True, "name": "x"}),
        ("--no-project --no-resume", {"project": False}),
        ("--resume runs/x", {"resume": True, "network": "runs/x"}),
        ("--sizes 0.1 8/255 --resume", {"sizes": (Radius(0.1), EPS), "resume": True}),
        ("x --eps 8/255 --rounds 2 --rho -2", {"network": "x", "eps": EPS, "rounds": 2, "rho": -2}),
        ("--dataset=image_folder:x", {"dataset": "image_folder:x"}),
        ("--layers last", {"layers": "last"}),
        ("--layers a b", {"layers": ["a", "b"]}),
        ("--seeds [3,4]", {"seeds": [3, 4]}),
        ("--seeds [3]", {"seeds": [3]}),
        ('--tree {"a":[1,null]}', {"tree": {"a": [1, None]}}),
        ("--rho null --augment false --eps None", {"rho": None, "augment": False}),
    ],
)
def test_options_from_the_command_line_and_from_a_file_of_them(words, expected, tmp_path, capsys):
    given = words.split()
    read = read_options(Options, given)
    assert read == Options(**expected)
    assert given == words.split()
    with pytest.raises(SystemExit) as stop:
        read_options(Options, [*given, "--print-config"])
    assert stop.value.code == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text()) == plain(read)
    file = ["--config", str(tmp_path / "mine.yaml")]
    assert read_options(Options, file) == read
    found = read_options(Options, ["other", *file, "--name", "mine"])
    wanted = Options(**expected | {"network": "other", "name": "mine"})
    assert found == wanted


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--batchsize 4", "Unrecognized options: --batchsize, 4"),
        ("--batch-size many", "--batch-size: must be an integer >= 1, got many"),
        ("--batch-size -1", "--batch-size: must be an integer >= 1, got -1"),
        ("--batch-size", "Missing value for argument"),
        ("--rounds 1", "must be an integer >= 2, got 1"),
        ("--share 1.0", "--share: must be a number > 0 and < 1, got 1.0"),
        ("--mode maybe", "invalid choice 'maybe' for argument '--mode'"),
        ("--eps 8/0", "eps must be a number or a fraction such as 8/255, got '8/0'"),
        ("--eps=-0.1", "eps must be >= 0 and finite, got '-0.1'"),
        ("--sizes 0.1 x", "Error parsing --sizes"),
        ("--dataset mnits", "dataset must be one of digits, "),
        ("--tree [1]", "--tree: must be a dict in YAML, got [1]"),
        ("--tree {", "--tree: while parsing"),
        ("a b", "Unrecognized options: b"),
        ("--config wrong.yaml", "Unrecognized options: --batchsize, 4 (in wrong.yaml)"),
        ("--config few.yaml", "invalid choice 'maybe' for argument '--mode' (in few.yaml)"),
        ("--config list.yaml", "error: list.yaml must hold options, such as epochs: 15"),
        ("--config five.yaml", "by name, such as epochs: 15, got the key 5; write an option's"),
        ("--config nowhere.yaml", "error: nowhere.yaml must be a file of options"),
    ],
)
def test_wrong_options_are_told_with_code_2(words, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"wrong": "batchsize: 4", "few": "mode: maybe", "list": "[1]", "five": "5: 3"}
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    with pytest.raises(SystemExit) as stop:
        check_options(Options, words.split())
    assert stop.value.code == 2
    told = unboxed(capsys.readouterr().err)
    for part in reason.split(" (in "):
        assert part.removesuffix(")") in told, told


@pytest.mark.parametrize(("flag", "everything"), [("--help", False), ("--help_all", True)])
def test_the_help_shows_what_people_change_and_all_if_asked(flag, everything, capsys):
    with pytest.raises(SystemExit) as stop:
        check_options(Options, [flag])
    assert stop.value.code == 0
    told = unboxed(capsys.readouterr().out)
    assert "--batch-size" in told
    assert texts_of(Options)["batch_size"] in told
    assert ("--rounds" in told) == everything


def test_wrong_use_is_a_value_error_that_is_told_apart():
    with pytest.raises(WrongUse, match="no such suite") as error, checked():
        raise ValueError("no such suite")
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(FileNotFoundError), checked():
        raise FileNotFoundError("no data")


def test_what_an_option_decides_and_when_it_decides_nothing():
    result = deciding(Options(eps=EPS))
    found = vars(Options()).keys() - result.keys()
    assert found == {"eps", "output", "resume"}
    assert [type(value) for value in deciding(Trained()).values()] == [float]  # weights_only
    assert idle(Options()) == {"beta"}  # of mode at, by the table of modes
    found = idle(Options(mode="trades", rho=0.0))
    assert found == {"beta", "project", "norm"}


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
    expected = Options(batch_size=6, name="kept", output="runs/digits-2", resume=True)
    assert resumed == expected
    resumed = parse_options(
        Options, ["--resume", "--output", "runs/digits-1", "--batch-size", "9"], stem
    )
    expected = Options(batch_size=9, name="kept", output="runs/digits-1", resume=True)
    assert resumed == expected
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        parse_options(Options, ["--resume", "--name", "other"], stem)


def test_a_readme_keeps_the_commands_that_came_before(tmp_path):
    for words in (["--which", "neuron"], ["--which", "gains"], ["--which", "neuron"]):
        describe_folder(tmp_path, "figures", words)
    text = (tmp_path / "README.md").read_text()
    found = [line for line in text.splitlines() if line.startswith("python ")]
    assert found == [
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
