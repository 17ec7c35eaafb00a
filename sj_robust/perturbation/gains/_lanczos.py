"""The largest singular value of a map that is known by its products alone."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SingularValue", "largest_singular_value"]


class SingularValue(NamedTuple):
    """An estimate from below.

    Attributes:
        value: The estimate.
        residual: ``||A^T u - value v||`` for the unit vectors with ``A v = value u``: some singular
            value is this near.
        iterations: Number of products with the map, and as many with its adjoint.
    """

    value: float
    residual: float
    iterations: int


def largest_singular_value(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
    basis: int = 48,
) -> SingularValue:
    """Power iteration that keeps what it has seen: Golub-Kahan-Lanczos bidiagonalisation, restarted
    when it is long.

    Each step costs what a step of the power iteration costs, one product with the map and one with
    its adjoint, and the estimate is the largest singular value of the map on the span of all steps:
    never below the power iteration's, never above the norm.

    ``start`` [n] must not be orthogonal to what is sought, so it is a random one. ``tolerance`` is
    the residual to stop at, relative to the value, and ``basis`` the number of vectors kept before
    the iteration starts again from the best.

    Source: Golub and Kahan, "Calculating the singular values and pseudo-inverse of a matrix"
        (1965).
    """
    iterations = 0
    while True:
        rights = [start / start.norm()]
        diagonal: list[float] = []
        above: list[float] = []
        left = torch.zeros(())
        while True:
            image = apply(rights[-1])
            iterations += 1
            if above:
                image = image - above[-1] * left
            diagonal.append(float(image.norm()))
            if diagonal[-1] > 0:
                left = image / diagonal[-1]
                following = adjoint(left) - diagonal[-1] * rights[-1]
                span = torch.stack(rights)
                for _ in range(2):
                    following = following - (span @ following) @ span
                above.append(float(following.norm()))
            else:
                above.append(0.0)
            small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
            small += torch.diag(torch.tensor(above[:-1], dtype=torch.float64), 1)
            lefts, values, right = torch.linalg.svd(small)
            value = float(values[0])
            residual = above[-1] * abs(float(lefts[-1, 0]))
            if residual <= tolerance * value or iterations >= max_iterations:
                return SingularValue(value, residual, iterations)
            if len(rights) == basis:
                break
            rights.append(following / above[-1])
        start = right[0].to(start) @ torch.stack(rights)
