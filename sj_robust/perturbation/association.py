"""Rank correlation, linear correlation and AUROC over many rows at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Association", "auroc", "pearson", "ranks", "spearman"]


@dataclass(frozen=True)
class Association:
    """One figure with its 95 % bootstrap interval; None where it is not defined.
    关联度及其置信区间。

    Attributes:
        value: On all images.
        low: Lower end.
        high: Upper end.
    """

    value: float | None
    low: float | None
    high: float | None


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension; equal values share the mean of their ranks."""
    ordered = values.sort(-1).values.contiguous()
    values = values.contiguous()
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1).double() / 2


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Linear correlation along the last dimension; NaN where one side does not vary."""
    first = first.double()
    second = second.double()
    first = first - first.mean(-1, keepdim=True)
    second = second - second.mean(-1, keepdim=True)
    scale = first.norm(dim=-1) * second.norm(dim=-1)
    correlation = (first * second).sum(-1) / scale
    return torch.where(scale > 0, correlation.clamp(-1, 1), torch.nan)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of the ranks along the last dimension; NaN where one side does not vary."""
    return pearson(ranks(first), ranks(second))


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """Probability that a positive scores higher than a negative of the same stratum, ties counting
    a half.

    Equation: ``sum_k U_k / sum_k P_k N_k`` with Mann and Whitney's U of each stratum.

    Args:
        scores: [*, strata, N].
        positive: [strata, N], boolean.

    Returns:
        [*]; NaN without a pair of a positive and a negative.
    """
    count = positive.double().sum(-1)
    rank_sum = (ranks(scores) * positive).sum(-1)
    above = rank_sum - count * (count + 1) / 2
    pairs = count * (positive.shape[-1] - count)
    return above.sum(-1) / pairs.sum()
