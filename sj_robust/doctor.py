"""What is installed and what can run on this machine: ``python -m sj_robust.doctor``, to paste into
a bug report.
"""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from torch import Tensor

from sj_robust._version import __version__
from sj_robust.core.environment import processor, version_of
from sj_robust.core.host import EVAL_MODE_HAS_NO_GRADIENT, lif_multi_step
from sj_robust.neuron import DLIFNode
from sj_robust.ops import available_backends
from sj_robust.ops.dlif import cpp

__all__ = ["report"]

_EXTRAS = {
    "": "always needed",
    "recipes": "for recipes/, training and plots",
    "attacks": None,  # AutoAttack says so where it is missing
    "cuda12": None,  # where CuPy matters, the reason of its backend says what to install
    "cuda13": None,
}
_VARIABLES = re.compile(
    r"(OMP|MKL|OPENBLAS|KMP|GOMP|PYTORCH|TORCH|CUDA|NVIDIA|CUPY|TRITON|NCCL|SJ_ROBUST)_.*|"
    r"NO_COLOR|FORCE_COLOR|CUDA_HOME|COLUMNS|TERM|PYTHONPATH|MPLBACKEND"
)
_SHAPE = (8, 32, 512)  # time steps, samples, features of the self test
_MARGIN = 1e-4  # a potential nearer to the threshold may round to either side


def report() -> str:
    """Versions, system, devices, backends (with the reason if one is not available), settings, a
    self test, and how to install what is missing.

    诊断报告：版本、系统、设备、后端、设置与自检。

    Plain text without colour; the home folder is written ``~``. It takes about a second per device.

    Examples:
        >>> "backend eager" in report()
        True
    """
    return _text(_self_tests())


def _main() -> None:
    """Print the report; exit with 1 if the self test fails.

    Raises:
        SystemExit: With code 1 if the chosen backend differs from the reference on a device.
    """
    tests = _self_tests()
    sys.stdout.write(_text(tests) + "\n")
    if any(map(_failed, tests.values())):
        sys.exit(1)


def _text(tests: dict[str, str]) -> str:
    packages, remedies = _packages()
    backends = available_backends()
    remedies += _remedies(backends, tests)
    python = f"{platform.python_version()} ({platform.python_implementation()}"
    triton = version_of("triton") or version_of("pytorch-triton")
    release = "interface of 2.x"
    if EVAL_MODE_HAS_NO_GRADIENT:
        release = (
            "interface of 0.0.0.0.14 (IF and LIF have no gradient in evaluation mode; "
            "SpikingClassifier handles this)"
        )
    usable = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    rows = [
        ("sj_robust", __version__),
        ("python", f"{python}, {platform.machine()})"),
        *packages,
        ("CUDA of torch", torch.version.cuda or "none"),
        ("triton", triton or "not installed"),
        ("SpikingJelly", release),
        ("system", platform.platform()),
        ("processor", f"{processor()}, torch uses {torch.backends.cpu.get_cpu_capability()}"),
        ("threads", f"{torch.get_num_threads()} of torch, {usable} processors usable"),
        *_devices(),
        *((f"backend {name}", state) for name, state in backends.items()),
        ("backend spikingjelly", "available" if lif_multi_step else "only on SpikingJelly 2.x"),
        ("compiled kernel", _kernel()),
        ("precision", f"float32 matrix products {torch.get_float32_matmul_precision()}"),
        *_settings(),
        *((f"self test {device}", verdict) for device, verdict in tests.items()),
        *(("to do", remedy) for remedy in remedies),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return _without_home("\n".join(lines))


def _packages() -> tuple[list[tuple[str, str]], list[str]]:
    """A row for each package that is asked for, and what to do where one is missing or outside its
    bounds.
    """
    rows = []
    remedies = []
    absent: dict[str, list[str]] = {}
    for needed, extra in _requirements():
        version = version_of(needed.name)
        if version is None:
            in_extra = f" (extra {extra})" if extra else ""
            rows.append((needed.name, f"not installed{in_extra}"))
            absent.setdefault(extra, []).append(needed.name)
        elif needed.specifier.contains(version, prereleases=True):
            rows.append((needed.name, version))
        else:
            rows.append((needed.name, f"{version}, MUST BE {needed.specifier}"))
            remedies.append(
                f"{needed.name} must be {needed.specifier}, got {version}: pip install -U "
                f"'{needed}'"
            )
    for extra, names in absent.items():
        if _EXTRAS[extra] is not None:
            command = f"'sj_robust[{extra}]'" if extra else " ".join(names)
            remedies.append(
                f"{', '.join(names)} not installed, {_EXTRAS[extra]}: pip install {command}"
            )
    return rows, remedies


def _requirements() -> list[tuple[Requirement, str]]:
    """What the installed distribution asks for, each package once, and the extra that it comes
    with.
    """
    try:
        lines = metadata.requires("sj_robust") or []
    except metadata.PackageNotFoundError:
        # a source tree that is not installed, so nobody says which versions
        lines = ["torch", "torchvision", "spikingjelly", "numpy"]
    found: dict[str, tuple[Requirement, str]] = {}
    for needed in map(Requirement, lines):
        extra = _extra_of(needed)
        if extra is None:
            continue
        needed.marker = None
        if needed.name in found:
            first, _ = found[needed.name]
            first.specifier &= needed.specifier
        else:
            found[needed.name] = (needed, extra)
    return list(found.values())


def _extra_of(needed: Requirement) -> str | None:
    """The first extra that comes with a package; None if none does."""
    for extra in _EXTRAS:
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            return extra
    return None


def _devices() -> Iterator[tuple[str, str]]:
    count = torch.cuda.device_count()
    for i in range(count):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        yield f"cuda:{i}", f"{gpu.name}, {memory}, driver {_driver()}"
    if not count:
        yield "GPU", "none that torch finds"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi does not run)"
    lines = done.stdout.splitlines()
    return lines[0].strip() if lines else "unknown"


def _kernel() -> str:
    """Whether a compiler built the CPU kernel when the package was installed, and which build of it
    runs.
    """
    if cpp.unavailable_reason() is not None:
        return "none that can run, see backend cpp; eager runs on the CPU"
    sets = cpp.instruction_sets()
    wanted = os.environ.get(cpp.INSTRUCTION_SET_VARIABLE, sets[-1])
    return f"installed, runs {wanted} (this processor: {', '.join(sets)})"


def _settings() -> list[tuple[str, str]]:
    found = []
    for name, value in sorted(os.environ.items()):
        if _VARIABLES.fullmatch(name):
            found.append((name, value or "set, empty"))
    return found or [("variables", "none that matter are set")]


def _self_tests() -> dict[str, str]:
    """The verdict by device."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return {name: _self_test(name) for name in ("cpu", *gpus)}


def _failed(verdict: str) -> bool:
    return verdict.startswith("FAILED")


def _self_test(device: str) -> str:
    start = time.perf_counter()
    backend = "auto"
    try:
        generator = torch.Generator().manual_seed(0)  # on the CPU: the same everywhere
        x = 0.5 + 0.6 * torch.randn(_SHAPE, generator=generator)
        gain = 1 + 0.2 * torch.randn(_SHAPE[0], generator=generator)
        grad = torch.randn(_SHAPE, generator=generator)
        reference = DLIFNode(_SHAPE[0], tau=2.0, store_v_seq=True, backend="reference")
        node = DLIFNode(_SHAPE[0], tau=2.0, store_v_seq=True, backend="auto")
        for neuron in (reference, node):
            neuron.to(device).input_gain.data.copy_(gain)
        x = x.to(device)
        backend = node.chosen_backend(x)
        failure = _difference(reference, node, x, grad.to(device))
    except Exception as error:  # whatever it is, a bug report wants to know it
        message = " ".join(str(error).split())
        failure = f"{type(error).__name__}: {message}"
    seconds = time.perf_counter() - start
    verdict = "passed" if failure is None else f"FAILED: {failure}"
    return f"{verdict} (backend {backend} against reference, forward and backward, {seconds:.2f} s)"


def _difference(reference: DLIFNode, node: DLIFNode, x: Tensor, grad: Tensor) -> str | None:
    """What differs, forward or backward, where no potential is too near to the threshold; None if
    nothing does.
    """
    expected_x = x.clone().requires_grad_()
    found_x = x.clone().requires_grad_()
    expected_spikes = reference(expected_x)
    found_spikes = node(found_x)
    assert reference.v_seq is not None  # store_v_seq
    potential = reference.v_seq.detach()
    start = torch.zeros_like(potential[:1])
    before = torch.cat((start, potential[:-1]))
    current = reference.input_gain.detach().view(-1, 1, 1) * x
    h = reference.decay * before + current
    clear = ((h - reference.v_threshold).abs() > _MARGIN).all(0)
    share_of_spikes = float(expected_spikes.detach().mean())
    if float(clear.double().mean()) < 0.99 or not 0.05 < share_of_spikes < 0.95:
        return "the spikes of the reference itself are implausible"
    grad = grad * clear
    torch.autograd.backward((expected_spikes, found_spikes), (grad, grad))
    pairs = {
        "spikes": (expected_spikes, found_spikes),
        "potential": (reference.v_seq, node.v_seq),
        "gradient of the input": (expected_x.grad, found_x.grad),
        "gradient of input_gain": (reference.input_gain.grad, node.input_gain.grad),
    }
    for name, (expected, found) in pairs.items():
        assert expected is not None
        assert found is not None
        if expected.ndim > 1:  # a gradient of gains is of all neurons
            expected = expected[:, clear]
            found = found[:, clear]
        rtol, atol = (0.0, 0.0) if name == "spikes" else (1e-3, 1e-4)
        if not torch.allclose(found, expected, rtol=rtol, atol=atol):
            distance = (expected - found).abs()
            return f"{name} differs by up to {float(distance.detach().max()):.3g}"
    return None


def _remedies(backends: dict[str, str], tests: dict[str, str]) -> list[str]:
    """What to do about backends that are missing where they would run, and about a failed self
    test.
    """
    missing = [name for name, state in backends.items() if state != "available"]
    asked = []
    if "cpp" in missing:
        asked.append("cpp")
    if torch.cuda.device_count() and "cupy" in missing and "triton" in missing:
        asked += ["cupy", "triton"]  # one of them is enough
    remedies = [f"backend {name}: {backends[name]}" for name in asked]
    advice = "use DLIFNode(..., backend='reference') there, and report this text"
    chosen = os.environ.get(cpp.INSTRUCTION_SET_VARIABLE)
    if chosen is not None:
        advice = f"unset {cpp.INSTRUCTION_SET_VARIABLE}, which is {chosen!r}; else {advice}"
    failed = [device for device, verdict in tests.items() if _failed(verdict)]
    return remedies + [f"the self test failed on {device}: {advice}" for device in failed]


def _without_home(text: str) -> str:
    home = str(Path.home())
    if len(home) < 2:
        return text
    as_a_whole = rf"{re.escape(home)}(?=[/\\\s:,;)'\"]|$)"
    return re.sub(as_a_whole, "~", text, flags=re.MULTILINE)


if __name__ == "__main__":
    _main()
