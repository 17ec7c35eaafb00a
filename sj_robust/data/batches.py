"""Which images form which batch."""

from collections.abc import Iterator
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sj_robust.core.checks import check_count
from sj_robust.data.files import UnreadableError

__all__ = ["ShuffledBatches", "image_loader"]


class ShuffledBatches(Sampler[list[int]]):
    """Indices of this process's share of every global batch, in an order that depends only on seed
    and epoch.

    No state is kept between epochs, so a run can continue anywhere by setting ``epoch`` and
    ``first_batch``, and the global batches are the same for any number of processes.
    由种子和轮次决定的可复现批次。

    Args:
        size: Number of images.
        batch_size: Images per global batch; the remainder of an epoch is dropped (different images
            in every epoch).
        seed: Determines the order, together with ``epoch``.
        rank: Number of this process.
        processes: Number of processes; each gets an equal share of every batch.

    Raises:
        ValueError: If there is no whole batch, or a batch cannot be shared equally.

    Examples:
        >>> batches = ShuffledBatches(10, 4, seed=0)
        >>> [len(batch) for batch in batches]
        [4, 4]
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int, rank: int = 0, processes: int = 1
    ) -> None:
        """Check the sizes; see the class."""
        if not 1 <= batch_size <= size:
            raise ValueError(
                f"batch_size must be from 1 to the number of training images, {size}; got "
                f"{batch_size}"
            )
        if batch_size % processes:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes, {processes}; got "
                f"{batch_size}"
            )
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.epoch = 0
        self.first_batch = 0
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Number of batches of a whole epoch."""
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Batches ``first_batch``, ``first_batch + 1``, ... of epoch ``epoch``."""
        epoch = self.epoch
        for batch in range(self.first_batch, len(self)):
            yield self.indices(epoch, batch)

    def indices(self, epoch: int, batch: int) -> list[int]:
        """This process's indices for one batch of one epoch, both counted from 0, independent of
        the sampler's own epoch and first batch.

        Raises:
            IndexError: If an epoch has no such batch.
        """
        if not 0 <= batch < len(self):
            raise IndexError(f"batch must be from 0 to {len(self) - 1}, got {batch}")
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
        start = batch * self.batch_size
        return self._order[1][start + self.rank : start + self.batch_size : self.processes]


def image_loader(
    dataset: Dataset[tuple[Tensor, ...]],
    batches: ShuffledBatches | int,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, ...]]:
    """Loader of batches in training order, or in the order of the data set if a batch size is
    given. 图像加载器。

    It never draws from torch's global random state, so it does not matter when it is created. Each
    worker loads four batches ahead; workers for a training order stay alive between epochs.

    Args:
        dataset: The images.
        batches: The order, or the number of images per batch.
        workers: Number of processes that load in the background.
        pin_memory: Whether batches are placed in pinned memory, for asynchronous copies to a GPU;
            ignored without a GPU.

    Returns:
        A loader of (images [N, C, H, W], labels [N]). During iteration it raises
        :class:`UnreadableError`, which names the file, if an image can no longer be read, and
        ``ChildProcessError`` if a worker was killed.

    Raises:
        ValueError: If the number of workers is negative.

    Examples:
        >>> from torch.utils.data import TensorDataset
        >>> [len(x) for (x,) in image_loader(TensorDataset(torch.rand(5, 1, 2, 2)), 2)]
        [2, 2, 1]
    """
    check_count("workers", workers, least=0)
    arguments: dict[str, Any] = {
        "num_workers": workers,
        "generator": torch.Generator().manual_seed(0),
        "pin_memory": pin_memory and torch.cuda.is_available(),
        "prefetch_factor": 4 if workers else None,
    }
    if isinstance(batches, int):
        return _Loader(dataset, batch_size=batches, **arguments)
    return _Loader(dataset, batch_sampler=batches, persistent_workers=workers > 0, **arguments)


class _Loader(DataLoader[tuple[Tensor, ...]]):
    """What fails in a worker is raised in one line."""

    # a generator is one as well
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:  # type: ignore[override]
        try:
            yield from super().__iter__()
            return
        except (UnreadableError, RuntimeError) as error:
            failure = self._explained(error)
            if failure is None:
                raise
            error.__traceback__ = None
        # Raised out here and without the old traceback, it does not keep the iterator and its
        # workers alive.
        raise failure

    def _explained(self, error: Exception) -> Exception | None:
        """What happened in one line, if it is known."""
        if isinstance(error, UnreadableError):
            # From a worker it comes with the worker's traceback, whose last line is "module.Class:
            # message".
            last = str(error).strip().splitlines()[-1]
            return UnreadableError(
                last.removeprefix(f"{UnreadableError.__module__}.{UnreadableError.__qualname__}: ")
            )
        reason = shorten(str(error), 200, placeholder=" ...")
        if "exited unexpectedly" in reason or "killed by signal" in reason:
            return ChildProcessError(
                f"a process that loads images was killed ({reason}), most often for want of "
                f"memory or of room in /dev/shm; use fewer than {self.num_workers} workers, or "
                "none"
            )
        return None
