"""The examples' Sybil: every page is a test, and one that is wrong fails, with the line."""

import contextlib
import re
import sys
import time
import tomllib
import traceback
from pathlib import Path

import pytest
from documentation import shell
from documentation.pages import PAGES, ROOT, PageError, blocks_of, documentation_pages, name_of
from sybil import Document
from sybil.example import SybilFailure


def test_pytest_finds_every_page():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "pytest"
    ]["ini_options"]
    for page in documentation_pages():
        assert any(page.is_relative_to(ROOT / name) for name in options["testpaths"]), name_of(page)
        assert PAGES.should_parse(page) or page.name == "quickstart_zh.md"


def test_the_chinese_page_has_the_blocks_of_the_english_one_which_run():
    english, chinese = (
        [
            re.sub(r" *#.*", "", block.code)
            for block in blocks_of(Document.parse(str(ROOT / "docs" / name)))
        ]
        for name in ("quickstart.md", "quickstart_zh.md")
    )
    assert chinese == english


def run(folder, text):
    """Run a page as pytest does, up to what is wrong with it."""
    (folder / "page.md").write_text(text, encoding="utf-8")
    document = PAGES.parse(folder / "page.md")
    PAGES.setup(document.namespace)
    try:
        for example in document:
            example.evaluate()
    finally:
        PAGES.teardown(document.namespace)


def line_of(error):
    """The line that a reader of pytest's report is led to."""
    if isinstance(error, PageError):
        return int(re.match(r"page\.md:(\d+): ", str(error))[1])
    if isinstance(error, SybilFailure):
        within = re.match(r"line (\d+): ", error.result)
        return int(within[1]) if within else error.example.line
    if isinstance(error, SyntaxError):
        return error.lineno
    trace = traceback.extract_tb(error.__traceback__)
    return [frame.lineno for frame in trace if frame.filename.endswith("page.md")][-1]


def fence(language, *lines, above=()):
    return "\n".join(["# Page", "", *above, f"```{language}", *lines, "```", ""])


RIGHT = fence(
    "python",
    "x = 1",
    "from pathlib import Path",
    "Path('left').write_text('by python')",
    "print(x)",
)
RIGHT += fence("pycon", ">>> x + 1", "2", ">>> print('a    b')", "a b", "")
RIGHT += fence("python", "# mine.py", "def f():", "    return x")
RIGHT += fence(
    "bash",
    "cat left  # comment",
    "test -e recipes/sweep.py -a -e docs/index.md",
    "export A=1; mkdir sub",
)
RIGHT += fence(
    "sh",
    "cd sub",
    "",
    "test $A = 1 && test -e ../left \\",
    "  && for i in 1; do",
    "  test $i",
    "done",
)
RIGHT += fence("bash", "test -e ../left", "cd ..; python -c 'import mine'", "cat <<END", "x", "END")
RIGHT += fence(
    "python", "import mine", "assert mine.f.__module__ == 'mine'", "assert Path('left').exists()"
)


def test_a_page_that_is_right(tmp_path):
    before = (Path.cwd(), list(sys.path))
    run(tmp_path, RIGHT)
    assert (Path.cwd(), sys.path) == before
    assert "mine" not in sys.modules


def test_a_block_that_needs_a_package_is_skipped_with_the_reason_where_it_is_missing(tmp_path):
    needs = "<!-- example: needs {} -->".format
    run(tmp_path, fence("python", "x = 1", above=[needs("math")]))
    with pytest.raises(pytest.skip.Exception, match="nowhere, which this block of the page needs"):
        run(tmp_path, fence("python", "x / 0", above=[needs("nowhere")]))


def test_an_error_keeps_the_words_of_its_cause_alone(tmp_path):
    """Sybil looks for its own frame in every error of a chain, and in a cause there is none."""
    lines = (
        "try:",
        "    int('many')",
        "except ValueError as error:",
        "    raise KeyError from error",
    )
    with pytest.raises(KeyError) as raised:
        run(tmp_path, fence("python", *lines))
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
    assert "ValueError: invalid literal" in raised.value.__notes__[0]


OPTIONS_ONLY, NOT_RUN = (
    "<!-- example: options only: needs data -->",
    "<!-- example: not run: slow -->",
)
WRONG = {
    "python": (fence("python", "x = 1", "x / 0"), 5, "division by zero"),
    "exit": (fence("python", "raise SystemExit(0)"), 4, "0"),
    "warning": (fence("python", "import warnings", "warnings.warn('old')"), 5, "old"),
    "syntax": (fence("python", "x = 1", "x = = 1"), 5, "invalid syntax"),
    "pycon": (fence("pycon", ">>> x = 2", ">>> x", "3"), 5, r"Expected:\n *3\nGot:\n *2"),
    "no session": (fence("pycon", "x = 2"), 3, "no >>>"),
    "bash": (
        fence("bash", "true", "", "echo before; exit 3"),
        6,
        r"echo before; exit 3\nexit code 3\nbefore",
    ),
    "pipe": (fence("bash", "false | cat"), 4, "exit code 1"),
    "syntax of bash": (fence("bash", "true", "done"), 5, "exit code 2"),
    "endless": (fence("bash", "true", "for i in 1; do"), 5, "exit code 2"),
    "empty": (fence("bash", "# nothing"), 3, "no command"),
    "pip": (fence("bash", ".venv/bin/pip install x"), 4, "installs nothing"),
    "file": (fence("bash", "cat nowhere"), 4, "nowhere"),
    "language": (
        fence("console", "$ true"),
        3,
        "language 'console' of this block; take one of python",
    ),
    "no language": (fence("", "true"), 3, "language ''"),
    "no end": ("```python\nx = 1\n", 1, "no end"),
    "unknown directive": (
        fence("bash", "true", above=["<!-- example: skip: x -->"]),
        3,
        "no such directive",
    ),
    "directive of lines": (
        fence("bash", "true", above=["<!-- example: add", "-->"]),
        3,
        "in one line",
    ),
    "nothing printed": (
        fence("python", "x = 1", above=["<!-- example: prints -->"]),
        4,
        "no block of text right",
    ),
    "no options": (
        fence("bash", "recipes/sweep.py", above=["<!-- example: add -->"]),
        3,
        "no such directive",
    ),
    "no reason": (
        fence("bash", "true", above=["<!-- example: not run -->"]),
        3,
        "no such directive",
    ),
    "empty reason": (
        fence("bash", "true", above=["<!-- example: options only: -->"]),
        3,
        "no such directive",
    ),
    "no block": (fence("bash", "true", above=[NOT_RUN, ""]), 3, "no block"),
    "no block at the end": (f"{NOT_RUN}\n", 1, "no block"),
    "nothing to do": (fence("text", "x", above=[NOT_RUN]), 4, "not run anyway"),
    "add to python": (
        fence("python", "x = 1", above=["<!-- example: add --x 1 -->"]),
        4,
        "only 'not run'",
    ),
    "add to nothing": (
        fence("bash", "true", above=["<!-- example: add --x 1 -->"]),
        4,
        "finds no command.*--x 1",
    ),
    "add to another": (
        fence(
            "bash",
            "echo recipes/sweep.py",
            above=["<!-- example: add to figures.py: --images 1 -->"],
        ),
        4,
        "finds no",
    ),
    "two": (fence("bash", "true", above=[NOT_RUN, OPTIONS_ONLY]), 5, "exclude each other"),
    "python not run": (
        fence("python", "x = = 1", above=[NOT_RUN]),
        4,
        "in a block that is not run: invalid syntax",
    ),
    "name": (
        fence("python", "from sj_robust.data import cats", above=[NOT_RUN]),
        4,
        "sj_robust.data has no cats",
    ),
    "extra": (
        fence("bash", "pip install -e '.[recipes,tests]'", above=[NOT_RUN]),
        4,
        "no extra 'tests'",
    ),
    "extra of the package": (
        fence("bash", "pip install 'sj_robust[gpu]'", above=[NOT_RUN]),
        4,
        "no extra 'gpu'",
    ),
    "recipe": (
        fence("bash", "python recipes/train.py", above=[NOT_RUN]),
        4,
        "recipes/train.py does not exist",
    ),
    "configuration": (
        fence("bash", "a --config recipes/configs/x.yaml", above=[NOT_RUN]),
        4,
        "x.yaml does not exist",
    ),
    "test": (
        fence("bash", "pytest tests/nowhere.py", above=[NOT_RUN]),
        4,
        "tests/nowhere.py does not exist",
    ),
}
REFUSED = {
    "unknown": ("python recipes/adv_train.py --epochz 1", "epochz"),
    "wrong value": ("python recipes/adv_train.py --epochs many", "many"),
    "choice": (".venv/bin/python recipes/figures.py runs/x --which all rha", "rha"),
    "in a loop": ("for s in 0 x; do python recipes/adv_train.py --seed $s; done", "seed"),
    "config": ("python recipes/adv_train.py --config recipes/configs/nowhere.yaml", "nowhere.yaml"),
    "recipe": ("python recipes/train.py", "recipes/train.py"),
    "torchrun": ("torchrun --nprocs 2 recipes/adv_train.py", "--nprocs"),
    "behind torchrun": ("torchrun --nproc-per-node 2 recipes/adv_train.py --lrr 1", "--lrr"),
    "accelerate": ("accelerate launch --num_gpus 2 recipes/adv_train.py", "--num_gpus"),
    "no launch": ("accelerate config", "accelerate config"),
    "other program": ("ls recipes", "without a recipe's command"),
    "other module": ("python -m pytest", "commands of recipes/"),
    "no recipe": ("true", "without a recipe's command"),
}
WRONG |= {
    f"options only, {name}": (
        fence("bash", command, above=[OPTIONS_ONLY]),
        4 if command in ("true", "ls recipes") else 5,
        re.escape(said),
    )
    for name, (command, said) in REFUSED.items()
}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "line", "message"), WRONG.values(), ids=WRONG)
def test_a_page_that_is_wrong(text, line, message, tmp_path):
    with pytest.raises(BaseException, match=f"(?s){message}") as error:
        run(tmp_path, text)
    assert line_of(error.value) == line


def test_what_is_right_in_blocks_that_are_not_run(tmp_path):
    installs = "pip install -e '.[recipes, test]' numpy[nothing]"
    run(
        tmp_path,
        fence(
            "bash",
            installs,
            "python recipes/adv_train.py --config mine/tests/x.py",
            above=[NOT_RUN],
        ),
    )
    run(tmp_path, fence("python", "from sj_robust import training", "import x", above=[NOT_RUN]))
    commands = [
        "for s in 0 1; do",
        "  python recipes/adv_train.py --seed $s --dataset image_folder:PATH --resume",
        "done",
        ".venv/bin/python recipes/evaluate.py CHECKPOINT --eps 8/255 # of the training",
        "python recipes/sweep.py --base digits --grid '{rho: [0, 1]}' --seeds 2 && python "
        "recipes/figures.py FOLDER",
        "python recipes/benchmark.py --what conv4",
    ]
    run(tmp_path, fence("bash", *commands, above=[OPTIONS_ONLY]))


@pytest.mark.parametrize(
    ("printed", "fault"),
    [
        ("at most 26.0 %, T = 4", None),
        ("at ... T = 4", None),
        ("... T = 4", None),
        ("at most 40.0 %, T = 4", "differs at 'at most 40.0"),
        ("at most 26.0 %, T = 5", "differs"),
        ("at most ... steps", "differs at 'steps'"),
        ("at most 26.0 %", "differs"),
        ("least ...", "differs at 'least'"),
    ],
)
def test_what_a_block_prints_is_compared(printed, fault, tmp_path):
    for language, code in (
        ("python", "print('at most 25.6 %,', 'T = 4')"),
        ("bash", "echo 'at most 25.6 %, T = 4'"),
    ):
        text = (
            fence(language, code, above=["<!-- example: prints -->"]) + f"```text\n{printed}\n```\n"
        )
        text = text.replace("```\n```text", "```\n\n```text")
        with pytest.raises(SybilFailure, match=fault) if fault else contextlib.nullcontext():
            run(tmp_path, text)


def test_a_command_that_takes_too_long_is_ended_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(shell, "LIMIT", 1)
    with pytest.raises(SybilFailure, match="line 4: .*\ntook longer than 1 s"):
        run(tmp_path, fence("bash", f"(sleep 2; touch {tmp_path}/left) & sleep 60"))
    time.sleep(2)
    assert not (tmp_path / "left").exists()


def test_a_fault_of_the_page_is_named_before_anything_runs(tmp_path):
    with pytest.raises(PageError, match="page.md:8: "):
        run(tmp_path, fence("python", "1 / 0") + fence("shell", "x"))


@pytest.mark.slow
def test_options_are_added_to_the_recipes(tmp_path):
    config = "python recipes/adv_train.py --print_config"
    lines = [
        f"{config} --seed 3 | grep 'epochs: 7'  # why; how",
        f"for i in 1; do\n  {config} | grep 'seed: 5'\ndone",
        "torchrun --nproc-per-node 1 recipes/adv_train.py --print_config \\\n  --rho 0.5 | grep "
        "'dataset: a b'",
        "python recipes/evaluate.py x --print_config > left && ! grep epochs left",
    ]
    above = [
        "<!-- example: add --seed 5 -->",
        "<!-- example: add to adv_train.py: --epochs 7 --dataset 'a b' -->",
    ]
    run(tmp_path, fence("bash", *lines, above=above))


@pytest.mark.parametrize(
    ("command", "alone"),
    [
        (
            "python recipes/adv_train.py --rho 0.5 --model-options '{strides: [2, 2]}'  # why; how",
            True,
        ),
        ('python3 ./recipes/evaluate.py runs/a/best.pt --eps 8/255 --name "a b"', True),
        ("python recipes/adv_train.py --rho 0.5 | grep rho", False),
        ("python recipes/adv_train.py --rho '#' && false", False),
        ("python recipes/adv_train.py --name a#b", False),
        ("python recipes/adv_train.py \\\n  --rho 0.5", False),
        ("python recipes/adv_train.py\npwd", False),
        ("python recipes/figures.py runs/{a,b} runs/*", False),
        ('python recipes/adv_train.py --name "$HOME"', False),
        ("X=1 python recipes/adv_train.py", False),
        ("torchrun recipes/adv_train.py", False),
    ],
)
def test_what_bash_would_change_is_left_to_bash(command, alone):
    assert bool(shell.ALONE.fullmatch(command)) == alone


@pytest.mark.slow
def test_a_recipe_by_itself_fails_in_this_process_and_after_an_export_in_its_own(tmp_path):
    wrong = "python recipes/adv_train.py --rho much"
    for line, said, before in (
        (4, re.escape(wrong), ()),
        (5, "exit code 2\nerror:", ("export A=1",)),
    ):
        with pytest.raises(
            SybilFailure, match=rf"line {line}: {wrong}\n{said}\s--rho must be a number, got much"
        ):
            run(tmp_path, fence("bash", *before, wrong))


def test_blocks_in_lists_and_longer_fences():
    text = "## A\n- item\n\n  ```python\n  if True:\n      x = 1\n  ```\n\n"
    text += "````text\n```c\n<!-- example: x -->\n```\n````\n"
    one, two = blocks_of(Document(text, "page.md"))
    assert (one.code, one.line) == ("if True:\n    x = 1\n", 4)
    assert two.code.count("\n") == 3
