"""What needs torch alone imports without the extras; what draws or shows imports its extra when it does so.

A module of ours that imports a package of an extra gets the error that it would get where the extra is not installed.
SpikingJelly brings some of these packages itself, so theirs are let through.
"""

import subprocess
import sys

import pytest

PACKAGES = ("evaluation", "estimators", "stability", "perturbation")
EXTRAS = {"accelerate", "jsonargparse", "matplotlib", "pyautoattack", "rich", "scipy", "sklearn", "tensorboard", "yaml"}
SCRIPT = f"""
import builtins, importlib, pkgutil

found = builtins.__import__

def without_extras(name, globals=None, locals=None, fromlist=(), level=0):
    if name.partition(".")[0] in {EXTRAS} and (globals or {{}}).get("__name__", "").startswith("sj_robust"):
        raise ModuleNotFoundError(f"{{globals['__name__']}} imports {{name}}")
    return found(name, globals, locals, fromlist, level)

builtins.__import__ = without_extras
for package in {PACKAGES}:
    path = importlib.import_module(f"sj_robust.{{package}}").__path__
    for module in pkgutil.walk_packages(path, f"sj_robust.{{package}}."):
        importlib.import_module(module.name)
        print(module.name)
"""


@pytest.mark.slow
def test_modules_import_without_the_extras():
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    drawing = {f"sj_robust.evaluation.{name}" for name in ("drawings", "html", "terminal")}
    assert drawing | {"sj_robust.evaluation.assess", "sj_robust.stability.certificate"} <= set(result.stdout.split())
