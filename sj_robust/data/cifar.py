"""CIFAR-10 and CIFAR-100, from the batches of their Python version."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sj_robust.data.locate import Wanted, located
from sj_robust.data.stored import Source, StoredImages, check_labels
from sj_robust.data.unreadable import one_line

__all__ = ["CIFAR_STATISTICS", "cifar"]

CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
"""Mean and standard deviation per channel, as Ding et al. (ICML 2024) take them."""

_LAYOUT = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{number}" for number in range(1, 6)], "test_batch", "labels"),
    "cifar100": ("cifar-100-python", ["train"], "test", "fine_labels"),
}


def cifar(name: str, root: Path, *, download: bool) -> Source:
    """``"cifar10"`` or ``"cifar100"``: 50,000 and 10,000 colour images of 32x32. 读取 CIFAR。

    The files are pickles, which can run code when they are read; here they may hold numpy arrays and plain values only.

    Args:
        name: Which of the two; the labels of CIFAR-100 are its 100 fine ones.
        root: Torchvision's folder, which holds ``cifar-10-batches-py`` or ``cifar-100-python``; or that folder itself.
        download: Whether torchvision may fetch the archive.

    Returns:
        Training and test images.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged.
    """
    folder, train, test, labels = _LAYOUT[name]
    classes, kind = (10, "CIFAR10") if name == "cifar10" else (100, "CIFAR100")

    def fetch() -> None:
        from torchvision import datasets

        getattr(datasets, kind)(root, download=True)

    wanted = Wanted(
        f"CIFAR-{classes}",
        [*train, test],
        (root / folder, root),
        fetch,
        f"python -c \"from torchvision.datasets import {kind}; {kind}('{root}', download=True)\"",
        hint=f"(if cifar-{classes}-python.tar.gz is there already, that unpacks it)",
    )
    found = located(wanted, download=download)
    parts = [_read(found[file], labels, classes) for file in train]
    pixels, numbers = (torch.cat(part) for part in zip(*parts, strict=True))
    return Source(
        StoredImages(pixels, numbers), StoredImages(*_read(found[test], labels, classes)), (3, 32, 32), classes
    )


def _read(path: Path, labels: str, classes: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] and labels [N] of one batch."""
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="latin1").load()
        pixels, numbers = np.asarray(content["data"]), torch.tensor(content[labels], dtype=torch.int64)
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(
            f"{path} cannot be read as a batch of CIFAR ({one_line(error)}); fetch the file again"
        ) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3 * 32 * 32 or numbers.ndim != 1:
        raise ValueError(
            f"{path} must hold bytes [N, 3072] and labels [N], got {pixels.dtype} {list(pixels.shape)} and "
            f"{list(numbers.shape)}; fetch the file again"
        )
    if len(pixels) != len(numbers):
        raise ValueError(f"{path} holds {len(pixels)} images but {len(numbers)} labels; fetch the file again")
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), check_labels(numbers, classes, path)


class _PlainUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain values, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR needs")
        return super().find_class(module, name)
