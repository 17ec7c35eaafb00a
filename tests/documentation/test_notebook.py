"""The notebook runs from top to bottom, and a cell that ends in a result shows it."""

import ast
import json
from collections import defaultdict

import pytest
from documentation.pages import ROOT
from evaluation.short_suite import shortened

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells_of(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    code = [cell["source"] for cell in content["cells"] if cell["cell_type"] == "code"]
    return ["".join(lines) for lines in code]


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
