"""What is installed and what runs here: ``python -m sj_robust.doctor``, to paste into a bug report."""

import importlib.util
import platform
import sys
from importlib import metadata

import torch

from sj_robust import __version__
from sj_robust._host import EVAL_MODE_HAS_NO_GRADIENT, lif_multi_step
from sj_robust.ops import available_backends

__all__ = ["main", "report"]

_PACKAGES = {
    "spikingjelly": "core",
    "torchvision": "core",
    "numpy": "core",
    "accelerate": "extra recipes",
    "jsonargparse": "extra recipes",
    "rich": "extra recipes",
    "tensorboard": "extra recipes",
    "matplotlib": "extra recipes",
    "scikit-learn": "extra recipes",
    "pyautoattack": "extra attacks",
}


def report() -> str:
    """Versions, SpikingJelly release, devices and backends, with the reason for each one that is missing.

    Examples:
        >>> "backend eager" in report()
        True
    """
    rows = [
        ("sj_robust", __version__),
        ("python", f"{platform.python_version()} ({platform.platform()})"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        *((name, _version(name, where)) for name, where in _PACKAGES.items()),
        ("cupy", "installed" if importlib.util.find_spec("cupy") else "not installed (extra cuda12 or cuda13)"),
        ("SpikingJelly", _release()),
        ("devices", _devices()),
        *((f"backend {name}", state) for name, state in available_backends().items()),
        ("backend spikingjelly", "available" if lif_multi_step else "only on SpikingJelly 2.x"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> None:
    """Print the report."""
    sys.stdout.write(report() + "\n")


def _version(package: str, where: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed ({where})"


def _release() -> str:
    if EVAL_MODE_HAS_NO_GRADIENT:
        return "interface of 0.0.0.0.14 (IF and LIF have no gradient in evaluation mode; SpikingClassifier sees to it)"
    return "interface of 2.x"


def _devices() -> str:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(["cpu", *names])


if __name__ == "__main__":
    main()
