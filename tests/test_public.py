"""The public surface is the table of public_names.py and nothing beside it, and what is imported is
declared.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import tomllib
from pathlib import Path

import pytest
from public_names import NEEDS_RECIPES, PUBLIC

import sj_robust

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
SHARED = {"sj_robust.classifier": {"as_classifier", "check_classifier", "step_mode_of"}}
"""Names that other files of the package use and users must not, where the module is public."""

IMPORT_NAMES = {
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "cupy-cuda12x": "cupy",
    "imagecorruptions-imaug": "imagecorruptions",
    "cupy-cuda13x": "cupy",
}


def test_every_part_is_in_the_table_or_internal():
    internal = {"sj_robust.core"}
    parts = {f"sj_robust.{found.name}" for found in pkgutil.iter_modules(sj_robust.__path__)}
    parts = {name for name in parts if not name.startswith("sj_robust._")}
    assert parts - internal <= set(PUBLIC)
    assert not internal & set(PUBLIC)


@pytest.mark.parametrize("module", PUBLIC)
def test_the_table_is_what_the_module_says_and_nothing_beside_it_leaks(module):
    """A package offers its names and its modules; a module's own functions and classes are offered
    or private.
    """
    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__) == sorted(PUBLIC[module])
    hidden = {name for name in vars(loaded) if not name.startswith("_")} - set(PUBLIC[module])
    if hasattr(loaded, "__path__"):
        hidden = {name for name in hidden if not inspect.ismodule(getattr(loaded, name))}
        hidden -= {"importlib", "TYPE_CHECKING", "Any"} if module == "sj_robust" else set()
    else:
        hidden = {
            name for name in hidden if getattr(vars(loaded)[name], "__module__", None) == module
        }
        hidden -= SHARED.get(module, set())
    assert not hidden


def test_parts_are_reached_from_the_package():
    parts = {module.split(".")[1] for module in PUBLIC if module.count(".") == 1}
    for part in parts:
        assert getattr(sj_robust, part) is sys.modules[f"sj_robust.{part}"]
    assert parts <= set(dir(sj_robust))
    with pytest.raises(AttributeError, match="no attribute 'atacks'"):
        _ = sj_robust.atacks


def test_every_package_that_is_imported_is_declared():
    core = {import_name(requirement) for requirement in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"].values()
    known = core | {import_name(requirement) for extra in extras for requirement in extra}
    for folder in ("sj_robust", "recipes", "docs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for name in packages(ast.walk(tree)):
                assert name in known, (
                    f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not name"
                )
    for module in PUBLIC.keys() - NEEDS_RECIPES:
        tree = ast.parse(Path(importlib.import_module(module).__file__).read_text(encoding="utf-8"))
        assert packages(tree.body) <= core, f"{module} must import with the dependencies alone"


def import_name(requirement):
    name = re.match(r"[\w-]+", requirement)[0]
    return IMPORT_NAMES.get(name, name)


def packages(nodes):
    """Packages that import statements name, neither ours nor Python's."""
    return (
        {name.split(".")[0] for name in imported(nodes)}
        - set(sys.stdlib_module_names)
        - {"sj_robust", "lab"}
    )


def imported(nodes):
    """Modules and names that import statements name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_way_to_deprecate_a_name_works(tmp_path, monkeypatch):
    """The text on the page, as the end of a module."""
    (text,) = re.findall(r"^```python\n(.*?)^```", COMPATIBILITY, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "module_that_lost_a_name.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("module_that_lost_a_name")
    with pytest.warns(
        DeprecationWarning, match="called pgd .* goes in .* import pgd from sj_robust.attacks"
    ) as caught:
        assert module.linf_pgd is sj_robust.attacks.pgd
    assert caught[0].filename == __file__, "the warning points at the line that uses the name"
    with pytest.raises(AttributeError, match="module_that_lost_a_name.* no attribute 'pgd'"):
        _ = module.pgd
