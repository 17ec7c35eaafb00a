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
SHARED = {
    "sj_robust": {"importlib", "TYPE_CHECKING", "Any"},
    "sj_robust.classifier": {"as_classifier", "check_classifier", "step_mode_of"},
}
"""Names that the package uses and users must not, where the module is public."""

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
    is_package = hasattr(loaded, "__path__")
    offered = set(PUBLIC[module]) | SHARED.get(module, set())
    leaked = []
    for name, value in vars(loaded).items():
        if name.startswith("_") or name in offered:
            continue
        own = getattr(value, "__module__", None) == module
        if own or (is_package and not inspect.ismodule(value)):
            leaked.append(name)
    assert leaked == []


def test_parts_are_reached_from_the_package():
    modules = [module for module in PUBLIC if module.count(".") == 1]
    parts = {module.removeprefix("sj_robust.") for module in modules}
    for part in parts:
        assert getattr(sj_robust, part) is sys.modules[f"sj_robust.{part}"]
    assert parts <= set(dir(sj_robust))
    with pytest.raises(AttributeError, match="no attribute 'atacks'"):
        _ = sj_robust.atacks


def test_every_package_that_is_imported_is_declared():
    known = {import_name(requirement) for requirement in PROJECT["dependencies"]}
    for extra in PROJECT["optional-dependencies"].values():
        known |= {import_name(requirement) for requirement in extra}
    for folder in ("sj_robust", "recipes", "docs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            beside = {other.stem for other in path.parent.glob("*.py")}  # of a script's own folder
            undeclared = packages(ast.walk(parsed(path))) - known - beside
            assert not undeclared, f"{path.relative_to(ROOT)} imports what pyproject.toml omits"


WITHOUT_EXTRAS = sorted(PUBLIC.keys() - NEEDS_RECIPES)


@pytest.mark.parametrize("module", WITHOUT_EXTRAS)
def test_modules_that_need_no_extra_import_with_the_dependencies_alone(module):
    core = {import_name(requirement) for requirement in PROJECT["dependencies"]}
    tree = parsed(Path(importlib.import_module(module).__file__))
    assert packages(tree.body) <= core


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def import_name(requirement):
    name = re.match(r"[\w-]+", requirement)[0]
    return IMPORT_NAMES.get(name, name)


def packages(nodes):
    """Packages that import statements name, neither ours nor Python's."""
    found = {name.split(".")[0] for name in imported(nodes)}
    of_scripts = {"rows", "defences_cost", "public_names"}
    return found - set(sys.stdlib_module_names) - {"sj_robust", "lab", *of_scripts}


def imported(nodes):
    """Modules and names that import statements name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
