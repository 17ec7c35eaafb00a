"""Versions, device and commit of a result."""

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from sj_robust._version import __version__

__all__ = [
    "CODE_KEY",
    "bfloat16_units",
    "device_of",
    "environment",
    "machine",
    "processor",
    "version_of",
]

CODE_KEY = "code on"
"""What the name of a digest of one's own network begins with; the machine follows."""


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions, device and commit, for the head of a log and for every report. 运行环境信息。

    What cannot be found is ``"unknown"``.

    Args:
        device: Where the computation runs.

    Examples:
        >>> environment()["torch"] == torch.__version__
        True
    """
    device = torch.device(device)
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sj_robust": __version__,
        "spikingjelly": version_of("spikingjelly") or "unknown",
        "accelerate": version_of("accelerate") or "unknown",
        "numpy": version_of("numpy") or "unknown",
        "platform": platform.platform(),
        "device": f"{device} ({name})",
        "threads": str(torch.get_num_threads()),
        "commit": _commit(),
    }


def device_of(model: nn.Module) -> torch.device:
    """Where a network is: the device of its first tensor, the CPU for one without any.
    网络所在设备。
    """
    tensors = model.state_dict().values()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def version_of(package: str) -> str | None:
    """The installed version of a package, None where there is none. 软件包版本。"""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> str:
    """What the rounding of a network's logits depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    return f"{device.type} {kind}, {torch.get_num_threads()} threads"


def processor() -> str:
    """Name of the processor."""
    return _cpu_information("model name") or platform.processor() or platform.machine()


def bfloat16_units() -> str | None:
    """What the processor multiplies bfloat16 with, ``"amx_bf16"`` or ``"avx512_bf16"``; None
    without such units.

    处理器的 bfloat16 乘法单元。
    """
    flags = _cpu_information("flags").split()
    return next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags), None)


def _cpu_information(field: str) -> str:
    """A field of Linux's file on the processor; empty where there is none."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    for line in lines:
        if line.startswith(field):
            return line.partition(":")[2].strip()
    return ""


@cache
def _commit() -> str:
    """Commit of the repository that this file lies in, with a mark if tracked files differ from
    it; asked for once, since a process goes on with the code that it began with.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # Fails where the package is installed inside somebody else's repository.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            check=True,
        )
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(describe, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
