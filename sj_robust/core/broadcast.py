"""Shapes that broadcast."""

from torch import Tensor

__all__ = ["along"]


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """One value per place of a dimension, [n], in a shape that broadcasts over tensors of ``ndim``
    dimensions.
    """
    before = [1] * dim
    behind = [1] * (ndim - dim - 1)
    return values.view(*before, -1, *behind)
