"""Shapes that broadcast, and batches with other rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["along", "beside"]


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """One value per place of a dimension, [n], in a shape that broadcasts over tensors of ``ndim``
    dimensions.
    """
    before = [1] * dim
    behind = [1] * (ndim - dim - 1)
    return values.view(*before, -1, *behind)


def beside(x: Tensor, others: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every second row of a batch beside rows of another one, then the rows between: where the rows
    of ``x`` are, [n] bool, and the batch.

    Examples:
        >>> [mixed.tolist() for _, mixed in beside(torch.ones(3), torch.zeros(3))]
        [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    even = torch.arange(len(x), device=x.device) % 2 == 0
    for kept in (even, ~even):
        yield kept, torch.where(along(kept, 0, x.ndim), x, others)
