"""What a recipe shows on a terminal and elsewhere, and what it leaves in its folder."""

import csv
import os
import re
import sys
import threading
from contextlib import suppress
from shlex import split

import launch
import pytest
from evaluation.recipe_run import undrawn
from evaluation.short_suite import shortened
from lab.sweeping.runs import RECORD_FILE, RunRecord
from launch import RECIPES, ROOT

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
import fcntl  # noqa: E402  # only where there are pseudo-terminals
import struct  # noqa: E402  # as above
import termios  # noqa: E402  # as above

pytestmark = pytest.mark.slow

TINY = split("--epochs 2 --train-limit 200 --test-limit 12 --channels 2 2 --T 2")
TRAIN = ("adv_train", *TINY, "--output", "f")
CONTROL = re.compile(r"\x1b\[[0-?]*[@-~]")


def through_a_pipe(folder, name, *options):
    return launch.finish(launch.start(name, folder, *options, launcher=()))


def on_a_terminal(folder, name, *options, columns=80, **variables):
    """Everything that a terminal gets of a recipe in this process, whose standard streams it is
    meanwhile.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    saved = [os.dup(number) for number in range(3)]
    parts = []

    def read():
        with suppress(OSError):  # Linux's way of saying that nobody writes any more
            while part := os.read(ours, 65536):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with pytest.MonkeyPatch.context() as patch, os.fdopen(theirs, "w") as terminal:
            for number in range(3):
                os.dup2(theirs, number)
            for variable in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
                patch.delenv(variable, raising=False)
            for variable, value in ({"TERM": "xterm-256color"} | variables).items():
                patch.setenv(variable, value)
            for stream in ("stdout", "stderr"):
                patch.setattr(sys, stream, terminal)
            launch.in_process(name, folder, *options)
    finally:
        for number, descriptor in enumerate(saved):
            os.dup2(descriptor, number)
            os.close(descriptor)
        reader.join()
        os.close(ours)
    return b"".join(parts).decode()


def drawn(text):
    """Lines as the terminal showed them at some time, without codes."""
    return [line for line in re.split(r"[\r\n]+", CONTROL.sub("", text)) if line.strip()]


def test_through_a_pipe_it_is_plain_with_a_line_per_epoch(folders, shown):
    out, err = shown["adv_train"]
    assert err == ""  # nothing of libraries either: the undefended LIF makes torch look for Triton
    assert "\x1b" not in out
    assert "\r" not in out
    lines = out.splitlines()
    for network in ("dlif_at", "lif_undefended"):
        found = [line.split(":")[0] for line in lines if line.startswith(network)]
        expected = [f"{network} epoch {epoch}/2" for epoch in (1, 2)]
        assert found == expected
    for text in ("loading digits", "writing to run", "evaluating dlif at on 12 test images"):
        assert text in lines
    assert "options: train_limit 200, test_limit 12, T 2, channels [2, 2], epochs 2" in lines
    assert lines[-1] == "report.json and report.png are in run"
    assert len(lines) < 25
    assert (
        "momentum: 0.9" in (folders["adv_train"] / "log.txt").read_text()
    )  # all options are there


@pytest.mark.parametrize(("columns", "variables"), [(50, {"NO_COLOR": "1"}), (80, {})])
def test_on_a_terminal_bars_move_and_fit_in_its_colours(tmp_path, columns, variables):
    # every part of the training takes longer than a bar is left as it is, which is a tenth of a
    # second
    longer = split("--train-limit 1400 --validation-fraction 0.5 --channels 16 32 --T 4")
    text = on_a_terminal(
        tmp_path,
        *TRAIN,
        *longer,
        *split("--no-reference --epochs 1"),
        columns=columns,
        **variables,
    )
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", text)) == (not variables)
    assert not variables or not re.search(
        r"\x1b\[[0-9;]*m", text
    )  # neither colours nor other marks of text
    lines = drawn(text)
    bars = [line for line in lines if "━" in line or "loading digits" in line]
    assert any("loading digits" in line for line in bars)
    assert any("validation" in line for line in bars)
    steps = [line for line in bars if "loss" in line]
    assert steps
    assert any("accuracy" in line for line in steps) == (columns > 50)
    for line in bars:
        assert len(line.rstrip()) <= columns
        assert "…" not in line or columns == 50
    assert "\x1b[?25h" in text  # the cursor is there again
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "dlif_at epoch 1/1" in text


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path):
    text = on_a_terminal(tmp_path, *TRAIN, "--no-reference", TERM="dumb")
    assert "dlif_at epoch 2/2" in text
    assert "\x1b" not in text
    assert "━" not in text


@pytest.fixture(scope="module")
def shown():
    """What recipes show while the folders below are made."""
    return {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, shown):
    """The folder of every recipe after a small run, most of them made in this process."""
    root = tmp_path_factory.mktemp("folders")
    options = "{epochs: 1, train_limit: 130, test_limit: 8, channels: [2, 2], T: 2, device: cpu}"
    calls = [
        ("adv_train", *TINY, "--output", "run"),
        split("evaluate run/dlif_at --suite fast --test-limit 6 --output evaluated"),
        split("figures run --eps 0.1 0.2 --steps 1 --images 40 --resamples 2"),
        (
            *split("sweep --base digits --options"),
            options,
            "--grid",
            "{rho: [1]}",
            *split("--evaluate paper --evaluation-options"),
            "{test_limit: 4}",
            "--output",
            "sweep",
        ),
        (
            *split("benchmark --shapes [[2,4,3,8,8]] --methods"),
            "DLIF eager",
            "textbook loop",
            *split("--rounds 2 --allocators malloc --no-check --output measured"),
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setattr(sys, "argv", ["benchmark.py", *calls[-1][1:]])  # which is told in the table
        shown["adv_train"] = through_a_pipe(root, *calls[0])
        with undrawn(), shortened():
            shown["evaluate"] = on_a_terminal(root, *calls[1], NO_COLOR="1")
            for name, *arguments in calls[2:-1]:
                launch.in_process(name, root, *arguments)
        launch.in_process(calls[-1][0], root, *calls[-1][1:])
    made = ("run", "evaluated", "sweep", "run/figures", "measured")
    return {name: root / folder for name, folder in zip(RECIPES, made, strict=True)}


TEMPLATES = sorted((ROOT / "recipes" / "lab" / "command_line" / "readmes").glob("*.md"))


def rows(template):
    """Names and patterns of files in the table of a README."""
    return re.findall(r"^\| `([^`]+)` \|", template.read_text(encoding="utf-8"), re.MULTILINE)


def described(file, names):
    """Whether a name or pattern fits a file; an asterisk does not reach into a folder, a slash at
    the end does.
    """
    for name in names:
        pattern = re.escape(name).replace(r"\*", "[^/]*")
        if name.endswith("/"):
            pattern += ".+"
        if re.fullmatch(pattern, file):
            return True
    return False


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_every_file_of_a_finished_folder_is_named_in_its_readme(folders, template):
    folder = folders[template.stem]
    name = template.stem
    names = rows(template)
    text = (folder / "README.md").read_text(encoding="utf-8")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [file for file in files if not described(file, names)] == []
    assert f"python recipes/{name}.py " in text
    assert "**Redraw" in text
    assert "FOLDER" not in text
    assert "COMMANDS" not in text
    always = [file for file in names if "*" not in file and not file.endswith("/")]
    found = [file for file in always if not (folder / file).exists()]
    assert found == []


def test_a_benchmark_leaves_numbers_table_and_chart_and_draws_it_again(folders, capsys):
    folder = folders["benchmark"]
    rows = list(csv.DictReader((folder / "neuron.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["DLIF eager", "textbook loop"]
    for row in rows:
        assert (
            0
            < float(row["best"])
            <= float(row["quartile1"])
            <= float(row["median"])
            <= float(row["quartile3"])
        )
        assert float(row["copy"]) > 0
        assert row["commit"]
    assert float(rows[0]["saved_mb"]) == 0.0
    text = (folder / "neuron.md").read_text()
    assert "| textbook loop |" in text
    assert "recipes/benchmark.py --shapes" in text
    chart = folder / "neuron.png"
    before = chart.read_bytes()
    assert before.startswith(b"\x89PNG")
    chart.unlink()
    launch.in_process("benchmark", folder, "--redraw", ".")
    assert chart.read_bytes() == before
    assert "neuron.csv drawn as neuron.png" in capsys.readouterr().out


def test_a_sweep_of_the_real_recipes_has_their_figures(folders):
    run = folders["sweep"] / "runs" / "rho1-seed0"
    record = RunRecord.load(run / RECORD_FILE)
    assert record.accuracies["paper/pgd7/last"] <= record.accuracies["paper/clean"]
    assert record.training["pgd20"]["total"] == 8
    assert (record.options["rho"], record.options["reference"]) == (1, False)
    assert record.environment["torch"]
    assert min(record.seconds.values()) > 0
    assert (run / "training" / "dlif_at" / "best.pt").is_file()


def test_an_evaluation_on_a_terminal(folders, shown):
    lines = drawn(shown["evaluate"])
    assert not re.search(r"\x1b\[[0-9;]*[34][0-7]m", shown["evaluate"])
    # without colours the pulse of rich is drawn with gaps, which wander
    part = re.compile(r"[-\\|/] checks for gradient masking [━ ]*━[━ ]* 0:0")
    found = [line for line in lines if "checks for gradient masking" in line]
    assert any(part.match(line) for line in found), found
    assert max(len(line.rstrip()) for line in lines if "━━━━" in line and "┃" not in line) <= 80
