"""Which images form which batch."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["ShuffledBatches", "image_loader"]


class ShuffledBatches(Sampler[list[int]]):
    """Indices of this process's share of every global batch, in an order that seed and epoch alone decide.

    Nothing is remembered between epochs, so a run continues anywhere by setting ``epoch`` and ``first_batch``, and
    the same global batches come out whatever the number of processes. 由种子和轮次决定的可复现批次。

    Args:
        size: Number of images.
        batch_size: Images per global batch; the remainder of an epoch is left out (another remainder every epoch).
        seed: Decides the order, together with ``epoch``.
        rank: Number of this process.
        processes: Number of processes, each of which gets an equal share of every batch.

    Raises:
        ValueError: If there is no whole batch, or a batch cannot be shared equally.

    Example:
        >>> batches = ShuffledBatches(10, 4, seed=0)
        >>> [len(batch) for batch in batches]
        [4, 4]
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, rank: int = 0, processes: int = 1) -> None:
        """Check the sizes; see the class."""
        if not 1 <= batch_size <= size:
            raise ValueError(f"batch_size must be from 1 to the number of training images, {size}; got {batch_size}")
        if batch_size % processes:
            raise ValueError(f"batch_size must be a multiple of the number of processes, {processes}; got {batch_size}")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.epoch = 0
        self.first_batch = 0

    def __len__(self) -> int:
        """Number of batches of a whole epoch."""
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Batches ``first_batch``, ``first_batch + 1``, ... of epoch ``epoch``."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for batch in range(self.first_batch, len(self)):
            start = batch * self.batch_size
            yield order[start + self.rank : start + self.batch_size : self.processes]


def image_loader(
    dataset: Dataset[tuple[Tensor, ...]], batches: ShuffledBatches | int, workers: int = 0
) -> DataLoader[tuple[Tensor, ...]]:
    """Loader of batches in training order, or in the set's own order if a batch size is given. 图像加载器。

    It never draws from torch's global random state, so when it is created does not change a run.

    Args:
        dataset: The images.
        batches: The order, or the number of images per batch.
        workers: Number of processes that load in the background.

    Returns:
        A loader of (images [N, C, H, W], labels [N]).

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> [len(x) for (x,) in image_loader(TensorDataset(torch.rand(5, 1, 2, 2)), 2)]
        [2, 2, 1]
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(batches, int):
        return DataLoader(dataset, batch_size=batches, num_workers=workers, generator=generator)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, generator=generator)
