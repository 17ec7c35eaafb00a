"""Street View House Numbers, from the MATLAB files of its cropped digits."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sj_robust.data.locate import Wanted, located
from sj_robust.data.stored import Source, StoredImages, check_labels
from sj_robust.data.unreadable import one_line

__all__ = ["svhn"]

_FILES = ("train_32x32.mat", "test_32x32.mat")


def svhn(root: Path, *, download: bool) -> Source:
    """73,257 and 26,032 colour images of 32x32. 读取 SVHN。

    Args:
        root: Folder with ``train_32x32.mat`` and ``test_32x32.mat``.
        download: Whether torchvision may fetch them.

    Returns:
        Training and test images; the file's label 10 is the digit 0.

    Raises:
        FileNotFoundError: If a file is missing.
        ModuleNotFoundError: If scipy is not installed.
        ValueError: If a file is damaged.
    """

    def fetch() -> None:
        from torchvision.datasets import SVHN

        for split in ("train", "test"):
            SVHN(root, split=split, download=True)

    calls = "; ".join(f"SVHN('{root}', split='{split}', download=True)" for split in ("train", "test"))
    command = f'python -c "from torchvision.datasets import SVHN; {calls}"'
    found = located(Wanted("SVHN", _FILES, (root, root / "SVHN"), fetch, command), download=download)
    train, test = (StoredImages(*_read(found[file])) for file in _FILES)
    return Source(train, test, (3, 32, 32), 10)


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] and digits [N]."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "SVHN comes in MATLAB files, which scipy reads; it is not installed: pip install scipy"
        ) from error
    try:
        content = loadmat(path, variable_names=("X", "y"))
        pixels, labels = np.asarray(content["X"]), np.asarray(content["y"]).reshape(-1)
    except Exception as error:  # a damaged file raises anything
        raise ValueError(
            f"{path} cannot be read as a file of SVHN ({one_line(error)}); fetch the file again"
        ) from error
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != 4
        or pixels.shape[:3] != (32, 32, 3)
        or len(labels) != pixels.shape[3]
    ):
        raise ValueError(
            f"{path} must hold X, bytes [32, 32, 3, N], and y with N labels, got {pixels.dtype} {list(pixels.shape)} "
            f"and {len(labels)} labels; fetch the file again"
        )
    digits = torch.from_numpy(labels.astype(np.int64))
    digits[digits == 10] = 0
    return torch.from_numpy(pixels.transpose(3, 2, 0, 1).copy()), check_labels(digits, 10, path)
