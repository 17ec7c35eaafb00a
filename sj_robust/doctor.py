"""What is installed and what runs here: ``python -m sj_robust.doctor``, to paste into a bug report."""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from sj_robust._host import EVAL_MODE_HAS_NO_GRADIENT, lif_multi_step
from sj_robust._version import __version__
from sj_robust.neuron import DLIFNode
from sj_robust.ops import available_backends
from sj_robust.ops.dlif import cpp

__all__ = ["main", "report"]

_SHOWN_EXTRAS = ("recipes", "attacks", "cuda12", "cuda13")
_VARIABLES = re.compile(
    r"(OMP|MKL|OPENBLAS|KMP|GOMP|PYTORCH|TORCH|CUDA|NVIDIA|CUPY|NCCL|SJ_ROBUST)_.*|NO_COLOR|FORCE_COLOR|CUDA_HOME|"
    r"COLUMNS|TERM|PYTHONPATH|MPLBACKEND"
)
_T, _SAMPLES, _FEATURES = 8, 32, 512
_MARGIN = 1e-4  # a potential nearer to the threshold may round to either side


@dataclass(frozen=True)
class _SelfTest:
    """DLIF forward and backward on one device; ``failure`` is None if they agree with the reference."""

    device: str
    backend: str
    seconds: float
    failure: str | None

    def __str__(self) -> str:
        verdict = "passed" if self.failure is None else f"FAILED: {self.failure}"
        return f"{verdict} (backend {self.backend} against reference, forward and backward, {self.seconds:.2f} s)"


def report() -> str:
    """Versions, system, devices, backends with reasons, settings, a self test, and what to do about what is missing.

    诊断报告：版本、系统、设备、后端、设置与自检。

    Plain text without colour; the home folder is written ``~``. It takes about a second per device.

    Examples:
        >>> "backend eager" in report()
        True
    """
    return _text(_self_tests())


def main() -> None:
    """Print the report; exit with 1 if the self test fails.

    Raises:
        SystemExit: With code 1 if the chosen backend differs from the reference on a device.
    """
    tests = _self_tests()
    sys.stdout.write(_text(tests) + "\n")
    if any(test.failure is not None for test in tests):
        sys.exit(1)


def _text(tests: list[_SelfTest]) -> str:
    packages, remedies = _packages()
    backends = available_backends()
    rows = [
        ("sj_robust", __version__),
        ("python", f"{platform.python_version()} ({platform.python_implementation()}, {platform.machine()})"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        *packages,
        ("SpikingJelly", _release()),
        ("system", platform.platform()),
        ("processor", _processor()),
        ("threads", f"{torch.get_num_threads()} of torch, {_usable_processors()} processors usable"),
        *_devices(),
        *((f"backend {name}", state) for name, state in backends.items()),
        ("backend spikingjelly", "available" if lif_multi_step else "only on SpikingJelly 2.x"),
        ("compiled kernel", _kernel()),
        ("precision", f"float32 matrix products {torch.get_float32_matmul_precision()}"),
        *_settings(),
        *((f"self test {test.device}", str(test)) for test in tests),
        *(("to do", remedy) for remedy in [*remedies, *_remedies(backends, tests)]),
    ]
    width = max(len(name) for name, _ in rows)
    return _without_home("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def _packages() -> tuple[list[tuple[str, str]], list[str]]:
    """Rows with the versions of what the package depends on, and what to do where one is missing or too old."""
    rows, remedies = [], []
    absent: dict[str, list[str]] = {}
    for name, least, extra in _requirements():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed" + (f" (extra {extra})" if extra else "")))
            absent.setdefault(extra, []).append(name)
            continue
        old = _numbers(version) < _numbers(least)
        rows.append((name, f"{version}, TOO OLD: {least} or later is needed" if old else version))
        if old:
            remedies.append(f"{name} {version} is too old: pip install -U '{name}>={least}'")
    for extra, names in absent.items():
        if extra.startswith("cuda"):
            continue  # the reason of the backend cupy says it where it matters
        command = f"'sj_robust[{extra}]'" if extra else " ".join(names)
        purpose = {"recipes": "for recipes/, training and plots", "attacks": "for AutoAttack"}.get(
            extra, "always needed"
        )
        remedies.append(f"{', '.join(names)} not installed, {purpose}: pip install {command}")
    return [row for row in rows if row[0] != "torch"], remedies


def _requirements() -> Iterator[tuple[str, str, str]]:
    """Name, least version and extra of what the installed distribution asks for."""
    try:
        lines = metadata.requires("sj_robust") or []
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        lines = ["torch>=2.6", "torchvision", "spikingjelly>=0.0.0.0.14"]
    for line in (*lines, "numpy"):  # which torch and torchvision bring
        name = re.match(r"[\w.-]+", line)
        least = re.search(r">=\s*([\w.]+)", line.partition(";")[0])
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", line)
        if name and (extra is None or extra[1] in _SHOWN_EXTRAS):
            yield name[0], least[1] if least else "0", extra[1] if extra else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"[\d.]*", version)[0].split(".") if number)  # type: ignore[index]  # matches any text


def _release() -> str:
    if EVAL_MODE_HAS_NO_GRADIENT:
        return "interface of 0.0.0.0.14 (IF and LIF have no gradient in evaluation mode; SpikingClassifier sees to it)"
    return "interface of 2.x"


def _processor() -> str:
    name = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(encoding="utf-8"), flags=re.MULTILINE)
        name = found[1] if found else name
    return f"{name or platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}"


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi does not run)"
    return (output.splitlines() or ["unknown"])[0].strip()


def _kernel() -> str:
    """Whether a compiler built the CPU kernel when the package was installed, and which build of it runs."""
    if cpp.unavailable_reason() is not None:
        return "none that can run, see backend cpp; eager runs on the CPU"
    sets = cpp.instruction_sets()
    wanted = os.environ.get(cpp.INSTRUCTION_SET_VARIABLE, sets[-1])
    return f"built by the compiler at installation, runs {wanted} (this processor: {', '.join(sets)})"


def _settings() -> list[tuple[str, str]]:
    found = [(name, value) for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)]
    return [(name, value or "set, empty") for name, value in found] or [("variables", "none that matter are set")]


def _self_tests() -> list[_SelfTest]:
    return [_self_test(name) for name in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))]


def _self_test(device: str) -> _SelfTest:
    start, backend = time.perf_counter(), "auto"
    try:
        x, gain, grad = _inputs(device)
        node = DLIFNode(_T, tau=2.0, store_v_seq=True).to(device)
        backend = node.chosen_backend(x)
        expected, h = _run(DLIFNode(_T, tau=2.0, store_v_seq=True, backend="reference").to(device), x, gain, grad)
        found, _ = _run(node, x, gain, grad)
        failure = _difference(expected, found, h)
    except Exception as error:  # whatever it is, a bug report wants to know it
        failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return _SelfTest(device, backend, time.perf_counter() - start, failure)


def _inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Currents [T, N, F], gains [T] and incoming gradients [T, N, F], the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + 0.6 * torch.randn(_T, _SAMPLES, _FEATURES, generator=generator)
    gain = 1 + 0.2 * torch.randn(_T, generator=generator)
    grad = torch.randn(x.shape, generator=generator)
    return x.to(device), gain.to(device), grad.to(device)


def _run(node: DLIFNode, x: Tensor, gain: Tensor, grad: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Spikes, potentials and gradients, and the potential h before every spike."""
    x = x.clone().requires_grad_()
    node.input_gain.data.copy_(gain)
    spikes = node(x)
    assert node.v_seq is not None  # store_v_seq
    potentials = node.v_seq.detach()
    before = torch.cat((torch.zeros_like(potentials[:1]), potentials[:-1]))
    h = node.decay * before + gain.view(-1, 1, 1) * x.detach()
    clear = ((h - node.v_threshold).abs() > _MARGIN).all(0)
    torch.autograd.backward(spikes, grad * clear)
    assert x.grad is not None  # the backward pass has just set both
    assert node.input_gain.grad is not None
    values = {"spikes": spikes.detach(), "potential": potentials, "gradient of the input": x.grad}
    return {**values, "gradient of input_gain": node.input_gain.grad}, h


def _difference(expected: dict[str, Tensor], found: dict[str, Tensor], h: Tensor) -> str | None:
    """What differs where no potential is too near to the threshold, or None."""
    clear = ((h - 1.0).abs() > _MARGIN).all(0)
    if float(clear.double().mean()) < 0.99 or not 0.05 < float(expected["spikes"].mean()) < 0.95:
        return "the reference itself spikes as no seed should make it"
    for name, value in expected.items():
        one, other = (a if a.ndim == 1 else a[:, clear] for a in (value, found[name]))
        exact = name == "spikes"
        if not (torch.equal(one, other) if exact else torch.allclose(one, other, rtol=1e-3, atol=1e-4)):
            return f"{name} differs by up to {float((one - other).abs().max()):.3g}"
    return None


def _remedies(backends: dict[str, str], tests: list[_SelfTest]) -> list[str]:
    """What to do about backends that are missing where they would run, and about a failed self test."""
    remedies = [f"backend cpp: {backends['cpp']}"] if backends["cpp"] != "available" else []
    if torch.cuda.device_count() and backends["cupy"] != "available":
        remedies.append(f"backend cupy: {backends['cupy']}")
    failed = [test.device for test in tests if test.failure is not None]
    advice = "use DLIFNode(..., backend='reference') there, and report this text"
    return remedies + [f"the self test failed on {device}: {advice}" for device in failed]


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text if len(home) < 2 else re.sub(rf"{re.escape(home)}(?=[/\\\s:,;)'\"]|$)", "~", text, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
