"""The doctor names everything a bug report needs, tests what it says, and fails where the kernel is
wrong.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
from ops.calls import needs_kernel

from sj_robust import __version__, doctor
from sj_robust.core.host import EVAL_MODE_HAS_NO_GRADIENT
from sj_robust.ops import available_backends
from sj_robust.ops.dlif import cpp, eager

CHOSEN = eager if cpp.unavailable_reason() else cpp


def rows(text):
    """Values by name, the name of two words included; ``to do`` as a list."""
    found = {}
    todo = []
    for line in text.splitlines():
        name, _, value = line.partition("  ")
        if name == "to do":
            todo.append(value.strip())
        else:
            found[name] = value.strip()
    return found, todo


@pytest.mark.slow
def test_report_of_the_command(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "sj_robust.doctor"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "HOME": str(tmp_path),
        "CUDA_CACHE_PATH": str(tmp_path / "cache"),
        "UNRELATED": "secret",
    }
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    found, _ = rows(result.stdout)
    assert found["sj_robust"] == __version__
    assert found["torch"] == metadata.version("torch")
    assert found["spikingjelly"] == metadata.version("spikingjelly")
    assert ("0.0.0.0.14" in found["SpikingJelly"]) == EVAL_MODE_HAS_NO_GRADIENT
    for name in ("scipy", "pillow", "pyyaml", "accelerate", "matplotlib", "scikit-learn", "triton"):
        assert re.match(r"\d|not installed", found[name]), name
    for name, state in available_backends().items():
        assert found[f"backend {name}"] == state
    assert found["threads"].startswith("1 of torch")
    assert found["OMP_NUM_THREADS"] == "1"
    assert found["NO_COLOR"] == "1"
    assert found["CUDA_CACHE_PATH"] == "~/cache"
    backend = CHOSEN.__name__.split(".")[-1]
    passed = rf"passed \(backend {backend} against .*, \d+\.\d\d s\)"
    assert re.fullmatch(passed, found["self test cpu"])
    assert str(tmp_path) not in result.stdout
    assert "secret" not in result.stdout
    assert result.stdout.isascii()
    assert "\x1b" not in result.stdout


@pytest.mark.skipif(cpp.unavailable_reason() is not None, reason=str(cpp.unavailable_reason()))
def test_which_build_of_the_kernel_runs(monkeypatch):
    assert f"runs {cpp.instruction_sets()[-1]} " in rows(doctor.report())[0]["compiled kernel"]
    monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, "baseline")
    found, _ = rows(doctor.report())
    assert "runs baseline " in found["compiled kernel"]
    assert found[cpp.INSTRUCTION_SET_VARIABLE] == "baseline"
    monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, "sse9")
    failed = rows(doctor.report())[0]["self test cpu"]
    assert failed.startswith(f"FAILED: ValueError: {cpp.INSTRUCTION_SET_VARIABLE} must be one of")


@dataclass(frozen=True)
class Wrong:
    """One number of one output of ``function`` is wrong: an inverted spike, or 0.1 too much."""

    function: str
    filled: str
    element: tuple[int, ...]
    named: str

    def fill(self, right, *args):
        """A backend's function, which fills the tensors of its last argument."""
        right(*args)
        value = getattr(args[-1], self.filled)
        value = value.view(len(value), -1)
        if self.named.startswith("spikes"):
            value[self.element] = 1 - value[self.element]
        else:
            value[self.element] += 0.1


WRONG = [
    Wrong("forward", filled="spike_seq", element=(3, 100), named="spikes differs by up to 1"),
    Wrong("forward", filled="v_seq", element=(3, 100), named="potential differs by up to"),
    Wrong("backward", filled="x_seq", element=(3, 100), named="gradient of the input differs"),
    Wrong("backward", filled="input_gain", element=(3,), named="gradient of input_gain differs"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.named)
def test_one_wrong_number_of_the_chosen_backend_fails(monkeypatch, capsys, wrong):
    right = getattr(CHOSEN, wrong.function)
    monkeypatch.setattr(CHOSEN, wrong.function, partial(wrong.fill, right))
    with pytest.raises(SystemExit) as exit_:
        doctor._main()
    assert exit_.value.code == 1
    found, todo = rows(capsys.readouterr().out)
    assert found["self test cpu"].startswith(f"FAILED: {wrong.named}")
    assert any("failed on cpu: use DLIFNode(..., backend='reference')" in line for line in todo)


@needs_kernel
def test_an_instruction_set_that_is_not_there_is_to_be_unset(monkeypatch, capsys):
    monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, "nonsense")
    with pytest.raises(SystemExit):
        doctor._main()
    _, todo = rows(capsys.readouterr().out)
    said = "failed on cpu: unset SJ_ROBUST_INSTRUCTION_SET, which is 'nonsense'; else use DLIFNode"
    assert any(said in line for line in todo)


def test_a_kernel_that_cannot_be_loaded_is_named_with_its_remedy(monkeypatch, tmp_path, capsys):
    (tmp_path / "_kernel.so").write_bytes(b"not a library")
    monkeypatch.setattr(cpp, "__file__", str(tmp_path / "cpp.py"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    cpp._load.cache_clear()
    try:
        doctor._main()
    finally:
        cpp._load.cache_clear()
    found, todo = rows(capsys.readouterr().out)
    remedy = "~/_kernel.so cannot be loaded .* install sj_robust again"
    assert re.match(remedy, found["backend cpp"])
    assert found["compiled kernel"].startswith("none that can run")
    assert found["self test cpu"].startswith("passed (backend eager")
    assert any(line.startswith("backend cpp: ~/_kernel.so cannot be loaded") for line in todo)


def test_missing_and_unsupported_packages_get_a_command(monkeypatch):
    versions = {
        "torch": "2.4.1+cpu",
        "torchvision": None,
        "accelerate": None,
        "rich": "12.0",
        "pyautoattack": None,
    }

    def version(name, real=metadata.version):
        found = versions.get(name, "")
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found or real(name)

    asked_for = """
        torch>=2.8
        torchvision>=0.23
        tyro>=99; extra == 'recipes'
        accelerate>=1.2; extra == 'recipes'
        rich>=13; extra == 'recipes'
        numpy<1,>=0.9; sys_platform != 'nowhere'
        pyautoattack<0.3,>=0.2; extra == 'attacks'
        rich<99; extra == 'attacks'
        mypy>=99; extra == 'test'
        spikingjelly>=99; sys_platform == 'nowhere'
        cupy-x>=13; extra == 'cuda12'
    """
    monkeypatch.setattr(metadata, "requires", lambda name: asked_for.strip().splitlines())
    monkeypatch.setattr(metadata, "version", version)
    text = doctor.report()
    found, todo = rows(text)
    names = [line.split()[0] for line in text.splitlines()]
    asked = [
        "torch",
        "torchvision",
        "tyro",
        "accelerate",
        "rich",
        "numpy",
        "pyautoattack",
        "cupy-x",
    ]
    seen = [name for name in names if name in asked or name in ("mypy", "spikingjelly")]
    assert seen == asked
    assert found["torchvision"] == "not installed"
    assert found["accelerate"] == "not installed (extra recipes)"
    assert found["pyautoattack"] == "not installed (extra attacks)"
    assert found["cupy-x"] == "not installed (extra cuda12)"
    assert found["rich"] == "12.0, MUST BE <99,>=13"
    assert todo == [
        "torch must be >=2.8, got 2.4.1+cpu: pip install -U 'torch>=2.8'",
        f"tyro must be >=99, got {version('tyro')}: pip install -U 'tyro>=99'",
        "rich must be <99,>=13, got 12.0: pip install -U 'rich<99,>=13'",
        f"numpy must be <1,>=0.9, got {version('numpy')}: pip install -U 'numpy<1,>=0.9'",
        "torchvision not installed, always needed: pip install torchvision",
        "accelerate not installed, for recipes/, training and plots: pip install "
        "'sj_robust[recipes]'",
    ]
