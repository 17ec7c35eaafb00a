"""The examples' Sybil: every page is a test, and one that is wrong fails, with the line."""

import re
import tomllib

import pytest
from documentation import shell
from documentation.pages import PAGES, ROOT, blocks_of
from sybil import Document


def test_pytest_finds_every_page_and_the_chinese_one_has_the_blocks_of_the_english_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    paths = project["tool"]["pytest"]["ini_options"]["testpaths"]
    assert {"README.md", "CONTRIBUTING.md", "docs", "recipes"} <= set(paths)
    assert code_of("docs/quickstart_zh.md") == code_of("docs/quickstart.md")


def code_of(page):
    """The blocks of a page without their comments."""
    blocks = blocks_of(Document.parse(str(ROOT / page)))
    return [re.sub(r" *#.*", "", block.code) for block in blocks]


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


def fence(language, code, *above):
    lines = [f"<!-- example: {one} -->" for one in above]
    return "\n".join([*lines, f"```{language}", code, "```", "", ""])


TRAIN = "python recipes/adv_train.py"
RIGHT = [
    fence("python", "x = 1\nfrom pathlib import Path\nPath('left').write_text('a')"),
    fence("pycon", ">>> x + 1\n2"),
    fence("python", "# mine.py\nx = 3"),
    fence("bash", "cat left  # comment\nexport A=1; mkdir sub"),
    fence("sh", "cd sub\nfor i in 1; do\n  test $A = 1 && test -e ../left\ndone"),
    fence("bash", "test -e ../left; cd ..; python -c 'import mine'\ncat <<END\nx\nEND"),
    fence("python", "import mine\nassert mine.x == 3"),
    fence("python", "x = 1", "needs math"),
    fence("python", "from sj_robust import training\nimport absent", "not run: slow"),
    fence("bash", "pip install '.[recipes, test]'", "not run: installs"),
    fence("bash", "echo 'at most 25.6 %'", "prints"),
    fence("text", "at most 26.0 %"),
    fence("python", "print(1, 2)", "prints"),
    fence("text", "...\n2"),
    fence("bash", f"{TRAIN} --print_config | grep 'epochs: 7'", "add to adv_train.py: --epochs 7"),
    fence("bash", "torchrun recipes/adv_train.py --seed 3", "options only: needs GPUs"),
    fence("bash", "sj-robust train --seed 3\nsj-robust compare a b", "options only: slow"),
    fence("bash", "sj-robust train --print_config | grep 'epochs: 7'", "add --epochs 7"),
    fence("bash", f"for s in 0 1; do {TRAIN} --seed $s; done", "options only: slow"),
]


@pytest.mark.slow
def test_a_page_that_is_right(tmp_path):
    run(tmp_path, "".join(RIGHT))
    with pytest.raises(pytest.skip.Exception, match="nowhere, which this block"):
        run(tmp_path, fence("python", "x / 0", "needs nowhere"))


WRONG = [
    (fence("python", "x = 1\nx / 0"), "division by zero"),
    (fence("python", "import warnings\nwarnings.warn('old')"), "old"),
    (fence("pycon", ">>> x = 2\n>>> x\n3"), r"Expected:\n *3\nGot:\n *2"),
    (fence("bash", "true\n\necho before; exit 3"), "line 4: echo .*\nexit code 3\nbefore"),
    (fence("bash", "false | cat"), "line 2: .*exit code 1"),
    (fence("bash", "# nothing"), "no command"),
    (fence("bash", ".venv/bin/pip install x"), "installs nothing"),
    (fence("python", "1 / 0") + fence("shell", "x"), "page.md:5: language 'shell'"),
    ("```python\nx = 1\n", "page.md:1: .*no end"),
    (fence("bash", "true", "skip: x"), "page.md:1: no such directive"),
    (fence("bash", "true", "not run"), "no such directive"),
    (fence("bash", "true", "not run: x").replace("```", "\n```"), "no block on the line below"),
    (fence("python", "x = 1", "prints"), "no block of text right"),
    (fence("python", "print(1)", "prints") + fence("text", "2"), "the page shows\n2"),
    (fence("bash", "echo a b", "prints") + fence("text", "a"), "the page shows\na"),
    (fence("text", "x", "not run: x"), "'not run'.* above a block of text"),
    (fence("python", "x = 1", "add --x 1"), "'add'.* above a block of python"),
    (fence("bash", "true", "add --x 1"), "finds no command.*--x 1"),
    (fence("bash", "true", "not run: x", "options only: x"), "exclude each other"),
    (fence("python", "x = = 1", "not run: x"), "not run: invalid syntax"),
    (fence("python", "from sj_robust.data import cats", "not run: x"), "cannot import name 'cats'"),
    (fence("bash", "pip install '.[tests]'", "not run: x"), "no extra .*tests"),
    (fence("bash", "python recipes/train.py", "not run: x"), "recipes/train.py does not exist"),
    (
        fence("bash", "sj-robust train --epoch 3", "options only: x"),
        "Unrecognized options: --epoch",
    ),
    (fence("bash", f"{TRAIN} --epochz 1", "options only: x"), "epochz"),
    (fence("bash", f"for s in x; do {TRAIN} --seed $s; done", "options only: x"), "seed"),
    (fence("bash", "torchrun --nprocs 2 recipes/adv_train.py", "options only: x"), "--nprocs"),
    (
        fence("bash", "accelerate launch --num_gpus 2 recipes/adv_train.py", "options only: x"),
        "--num_gpus",
    ),
    (fence("bash", "accelerate config", "options only: x"), "no command of a file of recipes"),
    (fence("bash", "ls recipes", "options only: x"), "no command in this block of a recipe"),
    (fence("bash", f"export A=1\n{TRAIN} --rho much"), "line 3: .*exit code 2.*--rho"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_page_that_is_wrong(text, message, tmp_path):
    with pytest.raises(BaseException, match=f"(?s){message}"):
        run(tmp_path, text)


def test_a_command_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(shell, "LIMIT", 1)
    with pytest.raises(BaseException, match="took longer than 1 s"):
        run(tmp_path, fence("bash", "sleep 60 & sleep 60"))
