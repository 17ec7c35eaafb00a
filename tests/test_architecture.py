"""Imports point one way, and `import sj_robust` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sj_robust

PACKAGE = Path(sj_robust.__file__).parent
LAYERS = [
    {"_version", "_host", "_preserved", "_saved", "ops"},
    {"neuron"},
    {"classifier", "fusion", "charging"},
    {"attacks", "perturbation", "stability"},
    {"models", "data", "plotting", "evaluation", "training", "benchmarking", "sweeping", "figures"},
    {"command_line", "doctor"},
]
HOST_FILES = {
    "_host.py", "neuron.py", "classifier.py", "fusion.py", "perturbation/monitor.py",
    "stability/operator.py", "stability/certificate.py",
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


def test_public_names():
    assert sj_robust.__all__ == ["DLIFNode", "MPPDMonitor", "SpikingClassifier", "__version__", "replace_neurons"]
    assert all(hasattr(sj_robust, name) for name in sj_robust.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_stand_under_the_title_that_the_site_knows(path):
    """Google style has a section ``Examples:``; a singular one is shown as a quotation."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "Example:" not in {line.strip() for line in lines}
