"""Imports point one way, `import sj_robust` stays light, and docs/concepts/architecture.md shows both.

``python tests/test_architecture.py`` writes the tree on the page anew from what the files say of themselves.
"""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import sj_robust

PACKAGE = Path(sj_robust.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "concepts" / "architecture.md"
TREE_BEGINS, TREE_ENDS = "<!-- tree: begin -->\n\n", "\n<!-- tree: end -->"
LAYERS = [
    {"_version", "_checks", "_host", "_preserved", "_recipes_installed", "_saved", "ops"},
    {"neuron"},
    {"classifier", "fusion", "charging"},
    {"attacks", "perturbation", "stability"},
    {"models", "data", "plotting", "evaluation", "training", "benchmarking", "sweeping", "figures"},
    {"command_line", "doctor"},
]
HOST_FILES = {
    "_host.py", "classifier.py", "fusion.py", "perturbation/monitor.py", "stability/operator.py",
}  # fmt: skip
HOST_FOLDERS = {"models", "data"}


def imports(path):
    """Every module a file imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(part):
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    relative = path.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    imported_parts = {name.split(".")[1] for name in imports(path) if name.startswith("sj_robust.")}
    for imported in imported_parts - {part, "_version", "__version__"}:
        assert layer_of(imported) <= layer_of(part), f"{relative} imports {imported}"
        if imported not in LAYERS[4]:
            assert layer_of(imported) < layer_of(part), f"{relative} imports {imported}, a sibling of its own layer"
    if part == "ops":
        assert imported_parts <= {"ops"}
    if part == "attacks" and relative.parts[1] != "estimators":
        assert imported_parts <= {"attacks", "_preserved"}
    touches_host = any(name.split(".")[0] == "spikingjelly" for name in imports(path))
    host_allowed = str(relative) in HOST_FILES or part in HOST_FOLDERS
    assert not touches_host or host_allowed, f"{relative} imports spikingjelly"


def test_only_the_bridge_asks_which_release_is_installed():
    for path in FILES:
        if path.name != "_host.py" and path.name != "doctor.py":
            text = path.read_text(encoding="utf-8")
            assert "spikingjelly.__version__" not in text, path
            assert 'version("spikingjelly")' not in text, path


def test_import_is_light():
    heavy = ["cupy", "matplotlib", "accelerate", "sklearn", "rich", "jsonargparse", "tensorboard"]
    # SpikingJelly itself imports matplotlib in one release and CuPy, where it is installed, in the other
    code = (
        "import sys, spikingjelly.activation_based.neuron, spikingjelly.activation_based.monitor;"
        "before = set(sys.modules);"
        f"import sj_robust; print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_stand_under_the_title_that_the_site_knows(path):
    """Google style has a section ``Examples:``; a singular one is shown as a quotation."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "Example:" not in {line.strip() for line in lines}


def test_every_part_has_its_layer():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    layers = [part for layer in LAYERS for part in layer]
    assert sorted(parts) == sorted(layers), "LAYERS names every file and folder of the package once"


def test_page_shows_the_direction_of_imports():
    lines = re.findall(r"^ +-> (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [set(line.split(", ")) for line in lines] == LAYERS[::-1], "the page and LAYERS differ"


def test_page_shows_the_tree():
    shown = PAGE.read_text(encoding="utf-8").split(TREE_BEGINS)[1].split(TREE_ENDS)[0]
    assert shown == tree(), "write the tree anew: python tests/test_architecture.py"


def tree():
    """Every folder and file of the package, with the first sentence that it says of itself."""
    lines = []
    for path in sorted(PACKAGE.rglob("*"), key=lambda path: path.relative_to(PACKAGE).parts):
        relative = path.relative_to(PACKAGE)
        if path.name == "__init__.py" or "__pycache__" in relative.parts or path.suffix == ".so":
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        indent = "    " * (len(relative.parts) - 1)
        text = f"- `{name}`: {said_of_itself(path / '__init__.py' if path.is_dir() else path)}"
        whole = {"break_long_words": False, "break_on_hyphens": False}
        lines += textwrap.wrap(text, 119, initial_indent=indent, subsequent_indent=f"{indent}  ", **whole)
    return "\n".join(lines) + "\n"


def said_of_itself(path):
    """First sentence of a file: of a Python file's docstring, of a kernel's comment on top."""
    if path.name == "py.typed":
        return "mark of a package that brings its types."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)).partition("\n\n")[0]
    else:
        said = re.sub(r"^// ?", "", re.match(r"(//.*\n)+", text)[0], flags=re.MULTILINE)
    said = re.sub(r":\w+:`~?(.+?)`", r"``\1``", " ".join(said.split()))
    return re.split(r"(?<=[.?])\s+(?=[A-Z])", said)[0].replace("``", "`")


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(TREE_BEGINS)[0], text.split(TREE_ENDS)[1]
    PAGE.write_text(before + TREE_BEGINS + tree() + TREE_ENDS + after, encoding="utf-8")
