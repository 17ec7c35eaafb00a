"""The handwritten digits that ship with scikit-learn."""

import torch

from sj_robust.data.stored import Source, StoredImages

__all__ = ["digits"]


def digits() -> Source:
    """1797 grey images of 8x8, a fixed fifth of which is the test set. 读取 scikit-learn 自带的手写数字。

    Returns:
        Training and test images.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits ship with scikit-learn, which is not installed: pip install 'sj_robust[recipes]'"
        ) from error
    bunch = load_digits()
    pixels, labels = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1), torch.from_numpy(bunch.target)
    # The set has no official split and is sorted by writer: a fixed shuffle, whatever the seed of the run.
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(20240521))
    train, test = order[360:], order[:360]
    return Source(
        StoredImages(pixels[train], labels[train], 16.0), StoredImages(pixels[test], labels[test], 16.0), (1, 8, 8), 10
    )
