"""Imports point one way, `import sj_robust` stays light, and docs/concepts/architecture.md shows
both.

``python tests/test_architecture.py`` writes the tree on the page anew from what the files say of
themselves.
"""

import ast
import itertools
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

import sj_robust

PACKAGE = Path(sj_robust.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "concepts" / "architecture.md"
TREE_BEGINS = "<!-- tree: begin -->\n\n"
TREE_ENDS = "\n<!-- tree: end -->"
LIBRARY = [
    {"_version", "core", "ops"},
    {"neuron"},
    {"classifier"},
    {"attacks", "defences", "estimators", "perturbation", "proofs"},
    {"data", "models"},
    {"evaluation"},
    {"training"},
    {"doctor"},
    {"__main__"},
]
LAYERS = [*LIBRARY, {"lab"}, {"recipes"}]
HOST_FOLDERS = {"models", "data"}
RECIPES = PACKAGE.parent / "recipes"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def by_module(folder, files):
    """Files by the name that ``import`` knows them by where ``folder`` is on the path."""
    found = {}
    for path in files:
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts)] = path
    return found


MODULES = by_module(PACKAGE.parent, FILES) | by_module(RECIPES, sorted(RECIPES.rglob("*.py")))


@cache
def imports(path):
    """Every name that a file imports, at any depth of nesting and for type checkers alone."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def module_of(name):
    """The file of this repository that an imported name lies in, as a module; None for other
    packages.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        stem = ".".join(parts[:length])
        for found in (stem, f"{stem}.__init__"):
            if found in MODULES:
                return found
    return None


def part_of(module):
    parts = module.split(".")
    if parts[0] == "sj_robust":
        return parts[1]
    return "lab" if parts[0] == "lab" else "recipes"


def layer_of(part):
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


@cache
def graph():
    """Modules of this repository that each one imports."""
    found = {}
    for module, path in MODULES.items():
        found[module] = {module_of(name) for name in imports(path)} - {None, module}
    return found


def edges():
    """Every module of this repository with every other one that it imports."""
    found = []
    for module in MODULES:
        found += [(module, imported) for imported in graph()[module]]
    return found


def test_imports_point_one_way():
    assert [edge for edge in edges() if uphill(*edge)] == []


def uphill(module, imported):
    part = part_of(module)
    other = part_of(imported)
    ground = {part, other} <= LAYERS[0] and part != "ops"
    return part != other and not ground and layer_of(other) >= layer_of(part)


def test_no_file_imports_what_is_private_to_another_package():
    for module, imported in edges():
        if part_of(module) != part_of(imported):
            private = re.search(r"\._(?!_)", imported.removeprefix("sj_robust._"))
            assert private is None, f"{module} imports {imported}"


def test_few_files_import_spikingjelly():
    for path in FILES:
        name = path.relative_to(PACKAGE)
        if name.parts[0] not in HOST_FOLDERS and str(name) != "core/host.py":
            packages = {imported.split(".")[0] for imported in imports(path)}
            assert "spikingjelly" not in packages, name


def test_attacks_know_torch_and_a_callable():
    known = {part_of(imported) for module, imported in edges() if part_of(module) == "attacks"}
    assert known == {"attacks", "core"}


def test_no_circle_of_files():
    """A package's ``__init__`` hands on what its files hold, so a file that imports its own package
    counts as well.
    """
    assert [module for module in MODULES if module in reached_from(module)] == []


def reached_from(module):
    """Every file that a file imports, and what those import in turn."""
    reached = set()
    coming = [module]
    while coming:
        new = graph()[coming.pop()] - reached
        reached |= new
        coming += new
    return reached


HEAVY = ["cupy", "matplotlib", "accelerate", "sklearn", "rich", "tyro", "tensorboard"]
LATE = [
    "torch._dynamo",
    "h5py",
    "spikingjelly.activation_based.model",
    "matplotlib",
    "torchaudio",
    "torchvision.datasets",
    "spikingjelly.datasets",
]
USERS = [
    "sj_robust.training",
    "sj_robust.data",
    "adv_train",
    "evaluate",
    "sweep",
    "figures",
    "benchmark",
]
# SpikingJelly itself imports matplotlib in one release and CuPy, where it is installed, in the
# other
CODE = f"""
import importlib, sys, spikingjelly.activation_based.neuron
before = set(sys.modules)
for module in {["sj_robust", *USERS]}:
    importlib.import_module(module)
    print(*(f"{{module}} imports {{one}}" for one in ({HEAVY} if module == "sj_robust" else {LATE})
            if one in sys.modules.keys() - before))
"""


EXTRAS = {
    "accelerate",
    "matplotlib",
    "pyautoattack",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "tyro",
    "yaml",
}
# A module of ours that imports a package of an extra gets the error that it would get where the
# extra is not installed. SpikingJelly brings some of these packages itself, so its imports are let
# through, but for tensorboard, which 0.0.0.0.14 imports and does not bring.
WITHOUT_EXTRAS = f"""
import builtins, importlib, pkgutil

found = builtins.__import__

def without_extras(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {{}}).get("__name__", "")
    package = name.partition(".")[0]
    if package == "tensorboard" or package in {EXTRAS} and importer.startswith("sj_robust"):
        raise ModuleNotFoundError(f"{{globals['__name__']}} imports {{name}}")
    return found(name, globals, locals, fromlist, level)

builtins.__import__ = without_extras
for package in ("evaluation", "estimators", "proofs", "perturbation"):
    path = importlib.import_module(f"sj_robust.{{package}}").__path__
    for module in pkgutil.walk_packages(path, f"sj_robust.{{package}}."):
        importlib.import_module(module.name)
        print(module.name)
"""


def said_by(code):
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=RECIPES, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_package_is_light_and_imports_compiler_matplotlib_and_data_sets_when_needed():
    assert said_by(CODE) == "\n" * 8


@pytest.mark.slow
def test_what_needs_torch_alone_imports_without_extras_and_what_draws_when_it_draws():
    drawing = {f"sj_robust.evaluation.report.{name}" for name in ("figures", "page", "terminal")}
    needed = {"sj_robust.evaluation.assess", "sj_robust.proofs.gains.certificate"}
    assert drawing | needed <= set(said_by(WITHOUT_EXTRAS).split())


def test_every_part_has_its_layer():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    layers = itertools.chain.from_iterable(LIBRARY)
    assert sorted(parts) == sorted(layers), "LAYERS names every file and folder of the package once"


def test_page_shows_the_direction_of_imports():
    lines = re.findall(r"^ +-> (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [set(line.split(", ")) for line in lines]
    assert found == LAYERS[-2::-1], "the page and LAYERS differ"


def test_page_shows_the_tree():
    shown = PAGE.read_text(encoding="utf-8").split(TREE_BEGINS)[1].split(TREE_ENDS)[0]
    assert shown == tree(), "write the tree anew: python tests/test_architecture.py"


def tree():
    """Every folder and file of the package but private modules and headers, with the first sentence
    that it says of itself; the files of a folder within a folder by their names alone.
    """
    lines = []
    for path in sorted(PACKAGE.rglob("*"), key=lambda path: path.relative_to(PACKAGE).parts):
        depth = len(path.relative_to(PACKAGE).parts)
        if not is_shown(path) or (depth > 2 and path.is_file()):
            continue
        if path.is_dir():
            text = f"- `{path.name}/`: {said_of_itself(path / '__init__.py')}"
        else:
            text = f"- `{path.name}`: {said_of_itself(path)}"
        if path.is_dir() and depth > 1:
            names = [f"`{file.name}`" for file in sorted(path.iterdir()) if is_shown(file)]
            text += f" {', '.join(names)}"
        indent = "    " * (depth - 1)
        lines += textwrap.wrap(
            text,
            width=119,
            initial_indent=indent,
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines) + "\n"


def is_shown(path):
    parts = path.relative_to(PACKAGE).parts
    hidden = path.name == "__init__.py" or path.suffix in {".h", ".so"}
    private = path.name.startswith("_") and len(parts) > 1
    return not (hidden or private or "__pycache__" in parts or "trained" in parts)


def said_of_itself(path):
    """First sentence of a file: of a Python file's docstring, of another one's comment on top."""
    if path.name == "py.typed":
        return "Marks the package as shipping type annotations."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)).partition("\n\n")[0]
    elif path.suffix == ".html":
        said = re.match(r"\{#-? (.*?) -?#\}", text)[1]
    else:
        said = re.sub(r"^// ?", "", re.match(r"(//.*\n)+", text)[0], flags=re.MULTILINE)
    said = re.sub(r":\w+:`~?(.+?)`", r"``\1``", " ".join(said.split()))
    return re.split(r"(?<=[.?])\s+(?=[A-Z])", said)[0].replace("``", "`")


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before = text.split(TREE_BEGINS)[0]
    after = text.split(TREE_ENDS)[1]
    PAGE.write_text(before + TREE_BEGINS + tree() + TREE_ENDS + after, encoding="utf-8")
