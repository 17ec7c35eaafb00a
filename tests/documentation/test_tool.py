"""The tool that runs the examples: it fails where a page is wrong, and says on which line."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from documentation import examples, shell
from documentation.pages import DIRECTIVES, PageError, blocks_of
from documentation.shell import CommandError, check_names, ends_of_recipes, logical_lines, with_options

TOOL = Path(examples.__file__)


def page_of(folder, text):
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def fence(language, *lines, above=()):
    return "\n".join(["# Page", "", *above, f"```{language}", *lines, "```", ""])


RIGHT = fence("python", "x = 1", "from pathlib import Path", "Path('left').write_text('by python')", "print(x)")
RIGHT += fence("pycon", ">>> x + 1", "2", ">>> print('a    b')", "a b", "")
RIGHT += fence("python", "# mine.py", "def f():", "    return x")
RIGHT += fence("bash", "cat left  # comment", "test -e recipes/sweep.py -a -e docs/index.md", "export A=1; mkdir sub")
RIGHT += fence("sh", "cd sub", "", "test $A = 1 && test -e ../left \\", "  && for i in 1; do", "  test $i", "done")
RIGHT += fence("bash", "test -e ../left", "cd ..; python -c 'import mine'", "cat <<END", "x", "END")
RIGHT += fence("python", "import mine", "assert mine.f.__module__ == 'mine'", "assert Path('left').exists()")


def test_a_page_that_is_right(tmp_path):
    before = (Path.cwd(), list(sys.path))
    examples.run_page(page_of(tmp_path, RIGHT))
    assert (Path.cwd(), sys.path) == before
    assert "mine" not in sys.modules


WRONG = {
    "python": (fence("python", "x = 1", "x / 0"), 5, r"block at line 3: x / 0\n.*ZeroDivisionError"),
    "exit": (fence("python", "raise SystemExit(0)"), 4, "SystemExit"),
    "warning": (fence("python", "import warnings", "warnings.warn('old')"), 5, "UserWarning: old"),
    "syntax": (fence("python", "x = 1", "x = = 1"), 5, "invalid syntax"),
    "said": (fence("python", "print('seen before')", "x / 0"), 5, "seen before"),
    "pycon": (fence("pycon", ">>> x = 2", ">>> x", "3"), 5, r"Expected:\n *3\nGot:\n *2"),
    "no session": (fence("pycon", "x = 2"), 3, "no >>>"),
    "bash": (fence("bash", "true", "", "echo before; exit 3"), 6, r"echo before; exit 3\nexit code 3\nbefore"),
    "pipe": (fence("bash", "false | cat"), 4, "exit code 1"),
    "syntax of bash": (fence("bash", "true", "done"), 5, "exit code 2"),
    "endless": (fence("bash", "true", "for i in 1; do"), 5, "exit code 2"),
    "empty": (fence("bash", "# nothing"), 3, "no command"),
    "pip": (fence("bash", ".venv/bin/pip install x"), 4, "installs nothing"),
    "file": (fence("bash", "cat nowhere"), 4, "nowhere"),
    "language": (fence("console", "$ true"), 3, "language 'console' of this block; take one of python"),
    "no language": (fence("", "true"), 3, "language 'missing'"),
    "no end": ("```python\nx = 1\n", 1, "no end"),
    "unknown directive": (fence("bash", "true", above=["<!-- example: skip: slow -->"]), 3, "'skip: slow'"),
    "directive of lines": (fence("bash", "true", above=["<!-- example: add", "-->"]), 3, "one line"),
    "no options": (fence("bash", "python recipes/sweep.py", above=["<!-- example: add -->"]), 3, "unknown directive"),
    "no reason": (fence("bash", "true", above=["<!-- example: not run -->"]), 3, "needs a reason"),
    "empty reason": (fence("bash", "true", above=["<!-- example: options only: -->"]), 3, "needs a reason"),
    "no block": (fence("bash", "true", above=["<!-- example: not run: slow -->", ""]), 3, "no block"),
    "no block at the end": ("<!-- example: not run: slow -->\n", 1, "no block"),
    "nothing to do": (fence("text", "x", above=["<!-- example: not run: slow -->"]), 4, "not run anyway"),
    "add to python": (fence("python", "x = 1", above=["<!-- example: add --x 1 -->"]), 4, "only 'not run'"),
    "add to nothing": (fence("bash", "true", above=["<!-- example: add --epochs 1 -->"]), 3, "finds no command"),
    "add to another": (
        fence("bash", "echo recipes/sweep.py", above=["<!-- example: add to figures.py: --images 1 -->"]),
        3,
        "finds no command",
    ),
    "two": (
        fence("bash", "true", above=["<!-- example: not run: slow -->", "<!-- example: options only: slow -->"]),
        5,
        "exclude each other",
    ),
}
OPTIONS_ONLY = "<!-- example: options only: needs data -->"
REFUSED = {
    "unknown": ("python recipes/adv_train.py --epochz 1", "epochz"),
    "wrong value": ("python recipes/adv_train.py --epochs many", "many"),
    "choice": (".venv/bin/python recipes/figures.py runs/x --which all rha", "rha"),
    "in a loop": ("for s in 0 x; do python recipes/adv_train.py --seed $s; done", "seed"),
    "config": ("python recipes/adv_train.py --config recipes/configs/nowhere.yaml", "nowhere.yaml"),
    "recipe": ("python recipes/train.py", "recipes/train.py does not exist"),
    "torchrun": ("torchrun --nprocs 2 recipes/adv_train.py", "--nprocs"),
    "behind torchrun": ("torchrun --nproc-per-node 2 recipes/adv_train.py --lrr 1", "--lrr"),
    "accelerate": ("accelerate launch --num_gpus 2 recipes/adv_train.py", "--num_gpus"),
    "no launch": ("accelerate config", "accelerate launch"),
    "other program": ("ls recipes", "commands of recipes, nothing else"),
    "other module": ("python -m pytest", "commands of recipes/"),
    "no recipe": ("true", "without a recipe's command"),
}


@pytest.mark.parametrize(("text", "line", "message"), WRONG.values(), ids=WRONG)
def test_a_page_that_is_wrong(text, line, message, tmp_path):
    with pytest.raises((PageError, examples.ExampleError)) as error:
        examples.run_page(page_of(tmp_path, text))
    assert str(error.value).startswith(f"page.md:{line}: ")
    assert re.search(message, str(error.value), re.DOTALL)


@pytest.mark.parametrize(("command", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_a_recipe_does_not_take(command, message, tmp_path):
    text = fence("bash", command, above=[OPTIONS_ONLY])
    with pytest.raises(examples.ExampleError, match=re.escape(message)) as error:
        examples.run_page(page_of(tmp_path, text))
    assert str(error.value).startswith(f"page.md:{4 if command == 'true' else 5}: ")


def test_options_that_a_recipe_takes(tmp_path):
    commands = [
        "for s in 0 1; do",
        "  python recipes/adv_train.py --seed $s --dataset image_folder:PATH --resume",
        "done",
        ".venv/bin/python recipes/evaluate.py CHECKPOINT --eps 8/255 # of the training",
        "python recipes/sweep.py --base digits --grid '{rho: [0, 1]}' --seeds 2 && python recipes/figures.py FOLDER",
        "torchrun --nnodes 2 --node-rank 0 --rdzv-endpoint HOST:29500 recipes/adv_train.py --batch_size 128",
        "accelerate launch --num_processes 4 recipes/adv_train.py --config recipes/configs/fashion_mnist.yaml",
        "python recipes/benchmark.py --what conv4",
    ]
    examples.run_page(page_of(tmp_path, fence("bash", *commands, above=[OPTIONS_ONLY])))


def test_a_command_that_takes_too_long_is_ended_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(shell, "LIMIT", 1)
    text = fence("bash", f"(sleep 2; touch {tmp_path}/left) & sleep 60")
    with pytest.raises(examples.ExampleError, match="(?s)page.md:4: .*took longer than 1 s"):
        examples.run_page(page_of(tmp_path, text))
    time.sleep(2)
    assert not (tmp_path / "left").exists()


def test_all_faults_of_a_page_are_named_before_anything_runs(tmp_path):
    text = fence("python", "1 / 0") + fence("shell", "x") + fence("bash", "true", above=["<!-- example: fast -->"])
    with pytest.raises(PageError) as error:
        blocks_of(page_of(tmp_path, text))
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == ["page.md:8", "page.md:13"]
    assert all(kind in str(error.value) for kind in DIRECTIVES)


def test_options_are_added_behind_the_recipe(tmp_path):
    above = ["<!-- example: add --epochs 1 -->", "<!-- example: add to evaluate.py: --suite fast -->"]
    [block] = blocks_of(page_of(tmp_path, fence("bash", "true", above=above)))
    for command in (
        "python recipes/adv_train.py<>",
        "python recipes/adv_train.py --lr 1<>   # why; how",
        "python recipes/sweep.py --grid '{a: [1; 2]}'<> | tee x",
        "for i in 1; do\n  python recipes/adv_train.py<>\ndone",
        "a recipes/adv_train.py \\\n  --b<> && c recipes/evaluate.py x<fast>",
        "python other/recipes/adv_train.py",
    ):
        expected = command.replace("<>", " --epochs 1").replace("<fast>", " --epochs 1 --suite fast")
        command = command.replace("<>", "").replace("<fast>", "")
        assert with_options(command, block.directives) == expected
    assert ends_of_recipes("cat recipes/README.md") == []


def test_logical_lines():
    commands = [
        "a",
        "b \\\n  c",
        "for i in 1; do\n  d\ndone",
        "cat <<E\ne\nE",
        "f &&\n  g",
        "h 'two\nlines'",
        "i # it's",
    ]
    assert [text for _, text in logical_lines("# first\n\n" + "\n\n# next\n".join(commands))] == commands
    assert logical_lines("\na\n\n  b\n") == [(1, "a"), (3, "  b")]


def test_what_a_block_that_is_not_run_names_exists(tmp_path):
    above = ["<!-- example: not run: installs packages -->"]
    right = ["pip install -e '.[recipes, test]' numpy[nothing]", "python recipes/adv_train.py --config mine/tests/x.py"]
    examples.run_page(page_of(tmp_path, fence("bash", *right, above=above)))
    examples.run_page(page_of(tmp_path, fence("python", "from sj_robust import training", "import x", above=above)))
    for line, message in {
        "x = = 1": "invalid syntax",
        "from sj_robust.data import load_pictures": "sj_robust.data has no load_pictures",
    }.items():
        with pytest.raises(examples.ExampleError, match=f"page.md:4: in a block that is not run: {message}"):
            examples.run_page(page_of(tmp_path, fence("python", line, above=above)))
    for line, message in {
        "pip install -e '.[recipes,tests]'": "no extra 'tests'",
        "pip install 'sj_robust[gpu]'": "no extra 'gpu'",
        "python recipes/train.py": "recipes/train.py does not exist",
        "python recipes/adv_train.py --config recipes/configs/x.yaml": "recipes/configs/x.yaml does not exist",
        "python -m pytest tests/nowhere.py": "tests/nowhere.py does not exist",
    }.items():
        with pytest.raises(CommandError, match=message):
            check_names(line)
        with pytest.raises(examples.ExampleError, match=f"page.md:4: in a block that is not run: .*{message}"):
            examples.run_page(page_of(tmp_path, fence("bash", line, above=above)))


def test_blocks_in_lists_and_longer_fences(tmp_path):
    text = "- item\n\n  ```python\n  if True:\n      x = 1\n  ```\n\n````text\n```c\n<!-- example: x -->\n```\n````\n"
    one, two = blocks_of(page_of(tmp_path, text))
    assert (one.code, one.line) == ("if True:\n    x = 1\n", 3)
    assert two.code.count("\n") == 3


def test_the_command_says_which_page_failed(tmp_path):
    right, wrong = tmp_path / "right.md", tmp_path / "wrong.md"
    right.write_text(fence("python", "assert True"))
    wrong.write_text(fence("bash", "echo here; false"))
    done = subprocess.run(
        [sys.executable, str(TOOL), str(right), str(wrong)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    for text in ("passed right.md", "FAILED wrong.md", "wrong.md:4: ", "exit code 1\nhere", "1 of 2 pages passed"):
        assert text in done.stdout
    assert examples.main([str(right)]) == 0
