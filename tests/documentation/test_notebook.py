"""The notebook runs from top to bottom, and a cell that ends in a result shows it."""

import ast
import importlib.util
import json
import re
import subprocess
from collections import defaultdict

import pytest
from documentation.pages import ROOT
from evaluation.short_suite import shortened

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells_of(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    code = [cell["source"] for cell in content["cells"] if cell["cell_type"] == "code"]
    return ["".join(lines) for lines in code]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_badge_on_top_opens_the_notebook_on_colab(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    path = notebook.relative_to(ROOT).as_posix()
    badge = re.search(r"\[!\[Open in Colab\]\(.*?\)\]\((.*?)\)", "".join(top_of(content)))
    address = r"https://colab\.research\.google\.com/github/sj-robust/sj_robust/blob/main/"
    assert re.fullmatch(address + re.escape(path), badge[1])


def top_of(content):
    return content["cells"][0]["source"][:4]


@pytest.mark.parametrize("there", ["sj_robust-0.1-py3-none-any.whl", "../../sj_robust/_version.py"])
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_the_first_cell_installs_the_wheel_beside_it_or_the_clone_around_it(
    notebook, there, tmp_path, monkeypatch
):
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
    with pytest.raises(ModuleNotFoundError, match="README"):
        value_of(cells_of(notebook)[0], {})
    (folder / there).parent.mkdir(exist_ok=True)
    (folder / there).touch()
    value_of(cells_of(notebook)[0], {})
    source = folder / there if there.endswith(".whl") else tmp_path
    assert [words[-1] for words in commands] == [f"{source}[recipes]"]


def value_of(code, namespace):
    """What a cell shows: the value of the expression that it ends in."""
    module = ast.parse(code)
    last = module.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(module, "cell", "exec"), namespace)
        return None
    del module.body[-1]
    exec(compile(module, "cell", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_every_cell_runs_and_results_show_themselves(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    shown = defaultdict(list)
    with shortened():
        for code in cells_of(notebook):
            value = value_of(code, namespace)
            shown[type(value).__name__].append(value)
    assert len(shown["Figure"]) >= 4
    assert shown["MPPDStatistics"]
    assert shown["Verification"]
    report = shown["Report"][0]
    assert report.clean.accuracy > 0.85, "the normalisation was lost"
    assert report.worst_case.correct < report.clean.correct
