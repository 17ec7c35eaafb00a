"""What a recipe shows on a terminal and elsewhere, and what it leaves in its folder."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
import fcntl  # noqa: E402  # only where there are pseudo-terminals
import struct  # noqa: E402  # as above
import termios  # noqa: E402  # as above

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
TINY = ("--epochs", "2", "--train-limit", "200", "--test-limit", "12", "--channels", "[2,2]", "--T", "2")
TRAIN = ("adv_train", *TINY, "--output", "f")
CONTROL = re.compile(r"\x1b\[[0-?]*[@-~]")


def command(name, *options):
    return [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *options]


def environment(**changes):
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return plain | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"} | changes


def through_a_pipe(folder, words):
    done = subprocess.run(command(*words), cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def on_a_terminal(folder, words, *, columns=80, **changes):
    """Everything that the terminal gets."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        command(*words), cwd=folder, env=environment(**changes), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way of saying that nobody writes any more
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    text = b"".join(parts).decode()
    assert process.wait() == 0, text
    return text


def drawn(text):
    """Lines as the terminal showed them at some time, without codes."""
    return [line for line in re.split(r"[\r\n]+", CONTROL.sub("", text)) if line.strip()]


def test_through_a_pipe_it_is_plain_with_a_line_per_epoch(tmp_path):
    out, err = through_a_pipe(tmp_path, TRAIN)
    assert err == ""  # nothing of libraries either: the undefended LIF makes torch look for Triton
    assert "\x1b" not in out
    assert "\r" not in out
    lines = out.splitlines()
    for network in ("dlif_at", "lif_undefended"):
        assert [line.split(":")[0] for line in lines if line.startswith(network)] == [
            f"{network} epoch {epoch}/2" for epoch in (1, 2)
        ]
    for text in ("loading digits", "writing to f", "evaluating dlif at on 12 test images"):
        assert text in lines
    assert "options: train_limit 200, test_limit 12, T 2, channels [2, 2], epochs 2" in lines
    assert lines[-1] == "report.json and report.png are in f"
    assert len(lines) < 25
    assert "momentum: 0.9" in (tmp_path / "f" / "log.txt").read_text()  # all options are there


@pytest.mark.parametrize("columns", [50, 80])
def test_on_a_terminal_bars_move_and_fit(tmp_path, columns):
    # every part of the training takes longer than a bar is left as it is, which is a tenth of a second
    longer = ("--train-limit", "1200", "--validation-fraction", "0.5", "--batch-size", "8", "--reference", "false")
    text = on_a_terminal(tmp_path, (*TRAIN, *longer), columns=columns, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*m", text)  # neither colours nor other marks of text
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


@pytest.mark.parametrize("terminal", ["xterm-256color", "dumb"])
def test_colours_and_bars_are_for_terminals_that_have_them(tmp_path, terminal):
    text = on_a_terminal(tmp_path, (*TRAIN, "--reference", "false"), TERM=terminal)
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", text)) == (terminal != "dumb")
    assert "dlif_at epoch 2/2" in text
    if terminal == "dumb":
        assert "\x1b" not in text
        assert "━" not in text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of every recipe after a small run, made in one process."""
    root = tmp_path_factory.mktemp("folders")
    options = "{epochs: 1, train_limit: 130, test_limit: 8, channels: [2, 2], T: 2, device: cpu}"
    calls = [
        ("adv_train", *TINY, "--output", "run"),
        ("evaluate", "run/dlif_at", "--suite", "fast", "--test-limit", "6", "--output", "evaluated"),
        ("figures", "run", "--eps", "0.1", "0.2", "--steps", "1", "--images", "40", "--resamples", "2"),
        ("sweep", "--base", "digits", "--options", options, "--grid", "{rho: [0, 1]}", "--evaluate", "[paper]",
         "--evaluation-options", "{test_limit: 4}", "--contrast", "[rho]", "--output", "sweep"),
        ("benchmark", "--shapes", "[[2,4,3,8,8]]", "--methods", "[DLIF eager, textbook loop]", "--rounds", "2",
         "--allocators", "[malloc]", "--check", "false", "--output", "measured"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("PYTHONPATH", str(ROOT))
        for name, *arguments in calls:
            importlib.import_module(name).main(arguments)
            AcceleratorState._reset_state(True)
    return {
        "adv_train": root / "run",
        "evaluate": root / "evaluated",
        "figures": root / "run" / "figures",
        "sweep": root / "sweep",
        "benchmark": root / "measured",
    }


TEMPLATES = sorted((ROOT / "recipes" / "lab" / "command_line" / "readmes").glob("*.md"))


def rows(template):
    """Names and patterns of files in the table of a README."""
    return re.findall(r"^\| `([^`]+)` \|", template.read_text(encoding="utf-8"), re.MULTILINE)


def described(file, names):
    """Whether a name or pattern fits a file; an asterisk does not reach into a folder, a slash at the end does."""
    patterns = (re.escape(name).replace(r"\*", "[^/]*") + (".+" if name.endswith("/") else "") for name in names)
    return any(re.fullmatch(pattern, file) for pattern in patterns)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_every_file_of_a_finished_folder_is_named_in_its_readme(folders, template):
    folder, name, names = folders[template.stem], template.stem, rows(template)
    text = (folder / "README.md").read_text(encoding="utf-8")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [file for file in files if not described(file, names)] == []
    assert f"python recipes/{name}.py " in text
    assert "**Draw again" in text
    assert "FOLDER" not in text
    assert "COMMANDS" not in text
    always = [file for file in names if "*" not in file and not file.endswith("/")]
    assert [file for file in always if not (folder / file).exists()] == []


def test_the_recipes_page_names_the_same_files():
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert {template.stem for template in TEMPLATES} == {"adv_train", "evaluate", "sweep", "figures", "benchmark"}
    for template in TEMPLATES:
        for file in rows(template):
            assert f"`{file}`" in text, f"{file} is not in recipes/README.md"


def test_charts_of_measurements_are_drawn_again_from_their_numbers(folders, monkeypatch, capsys):
    chart = folders["benchmark"] / "neuron.png"
    before = chart.read_bytes()
    chart.unlink()
    importlib.import_module("benchmark").main(["--redraw", str(folders["benchmark"])])
    assert chart.read_bytes() == before
    assert "neuron.csv drawn as neuron.png" in capsys.readouterr().out


def test_an_evaluation_on_a_terminal_and_through_a_pipe(folders, tmp_path):
    words = ("evaluate", str(folders["adv_train"] / "dlif_at"), "--suite", "fast", "--test-limit", "6")
    out, err = through_a_pipe(tmp_path, (*words, "--output", "a"))
    assert err == ""
    assert "\x1b" not in out
    assert "signs of gradient masking" in out.splitlines()
    text = on_a_terminal(tmp_path, (*words, "--output", "b"), NO_COLOR="1")
    lines = drawn(text)
    assert not re.search(r"\x1b\[[0-9;]*[34][0-7]m", text)
    assert any(re.match(r"[-\\|/] signs of gradient masking +━+ +0:0", line) for line in lines)
    assert max(len(line.rstrip()) for line in lines if "━━━━" in line and "┃" not in line) <= 80
