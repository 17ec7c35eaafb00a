"""The notebook runs from top to bottom, and a cell that ends in a result shows it."""

import ast
import json

import pytest
from documentation.pages import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells_of(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def value_of(code, namespace):
    """What a cell shows: the value of the expression that it ends in."""
    *statements, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        statements, last = [*statements, last], None
    exec(compile(ast.Module(statements, []), "cell", "exec"), namespace)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_every_cell_runs_and_results_show_themselves(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    values = [value_of(code, namespace) for code in cells_of(notebook)]
    shown = [type(value).__name__ for value in values if value is not None]
    assert shown.count("Figure") >= 4
    assert {"Report", "MPPDStatistics", "Verification"} <= set(shown)
    report = next(value for value in values if type(value).__name__ == "Report")
    assert report.clean.accuracy > 0.85, "the normalisation was lost"
    assert report.worst_case.correct < report.clean.correct
