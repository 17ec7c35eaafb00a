"""MNIST and Fashion-MNIST, from their IDX files."""

from pathlib import Path

from torch import Tensor

from sj_robust.data.idx import read_idx
from sj_robust.data.locate import Wanted, located
from sj_robust.data.stored import Source, StoredImages, check_labels

__all__ = ["mnist"]

_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
_TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
# The files of both sets have the same names.
_FIRST_TEST_LABELS = {"mnist": [7, 2, 1, 0, 4, 1, 4, 9], "fashion_mnist": [9, 2, 1, 1, 6, 1, 4, 6]}


def mnist(name: str, root: Path, *, download: bool) -> Source:
    """``"mnist"`` or ``"fashion_mnist"``: 60,000 and 10,000 grey images of 28x28. 读取 MNIST 或 Fashion-MNIST。

    Args:
        name: Which of the two.
        root: Folder with the four IDX files, gzipped or not, or torchvision's folder that holds ``MNIST/raw`` or
            ``FashionMNIST/raw``.
        download: Whether torchvision may fetch them.

    Returns:
        Training and test images.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, misnamed or of the other data set.
    """
    found = located(_wanted(name, root), download=download)
    tensors = [_read(file, path) for file, path in found.items()]
    for at in (0, 2):
        images, labels, path = tensors[at], tensors[at + 1], found[_FILES[at + 1]]
        if len(images) != len(labels):
            raise ValueError(
                f"{path.parent} holds {len(images)} images but {len(labels)} labels: the files do not belong together"
            )
        check_labels(labels, 10, path)
    first = tensors[3][:8].tolist()
    for other, expected in _FIRST_TEST_LABELS.items():
        if first == expected and other != name:
            folder = found[_FILES[3]].parent
            raise ValueError(f"{folder} holds {_TITLES[other]}, not {_TITLES[name]}; use the data set {other!r}")
    train, test = (StoredImages(tensors[at].unsqueeze(1), tensors[at + 1]) for at in (0, 2))
    return Source(train, test, (1, int(tensors[0].shape[1]), int(tensors[0].shape[2])), 10)


def _wanted(name: str, root: Path) -> Wanted:
    kind = _CLASSES[name]

    def download() -> None:
        from torchvision import datasets

        getattr(datasets, kind)(root, download=True)

    debian = (
        "or, on Debian and Ubuntu, apt-get install dataset-fashion-mnist and "
        "--data-root /usr/share/datasets/fashion-mnist"
    )
    return Wanted(
        _TITLES[name],
        _FILES,
        (root / kind / "raw", root),
        download,
        f"python -c \"from torchvision.datasets import {kind}; {kind}('{root}', download=True)\"",
        ("", ".gz"),
        debian if name == "fashion_mnist" else "",
    )


def _read(file: str, path: Path) -> Tensor:
    tensor = read_idx(path)
    expected = 3 if "images" in file else 1
    if tensor.ndim != expected:
        raise ValueError(f"{path} must hold an array of {expected} dimensions, got {tensor.ndim}: is it misnamed?")
    return tensor
