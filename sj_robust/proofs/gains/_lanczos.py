"""The largest singular value of a map that is known by its products alone."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SingularValue", "largest_singular_value"]


class SingularValue(NamedTuple):
    """An estimate that is never above the largest singular value.

    Attributes:
        value: The estimate.
        residual: ``||A^T u - value v||`` for the unit vectors with ``A v = value u``: some singular
            value is within this distance of the estimate.
        iterations: Number of products with the map, and of products with its adjoint.
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
    """Golub-Kahan-Lanczos bidiagonalisation: a power iteration that uses all vectors of its steps.

    A step costs what one of the power iteration costs: a product with the map and one with its
    adjoint. The estimate is the largest singular value of the map on the span of all steps; it is
    never below that of the power iteration, and never above the norm.

    ``start`` [n] must not be orthogonal to the singular vector, so it should be random.
    ``tolerance`` is the residual at which it stops, relative to the value. After ``basis`` vectors
    it starts again from the best vector of their span.

    Source: Golub and Kahan, "Calculating the singular values and pseudo-inverse of a matrix"
        (1965).
    """
    iterations = 0
    while True:
        span = _Span(start)
        for _ in range(basis):
            span.extend(apply, adjoint)
            iterations += 1
            best = span.best()
            if best.residual <= tolerance * best.value or iterations >= max_iterations:
                return SingularValue(best.value, best.residual, iterations)
        start = span.combined(best.weights)


class _Best(NamedTuple):
    """Largest singular value on a span, its residual, and the weights of the vectors that make its
    right singular vector.
    """

    value: float
    residual: float
    weights: Tensor


class _Span:
    """The map A on orthonormal vectors V, where it is an upper bidiagonal matrix: ``A V = U B``.

    Attributes:
        rights: Vectors of V.
        diagonal: Diagonal of B.
        above: Entries of B above the diagonal, of which the last belongs to the next vector.
    """

    def __init__(self, start: Tensor) -> None:
        self.rights = [start / start.norm()]
        self.diagonal: list[float] = []
        self.above: list[float] = []
        self._left = torch.zeros(())  # last vector of U
        self._following = start  # next vector of V, times the last entry above the diagonal

    def extend(
        self, apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> None:
        """Multiply one more vector by the map, and the result by the adjoint."""
        if self.above:
            self.rights.append(self._following / self.above[-1])
        image = apply(self.rights[-1])
        if self.above:
            image = image - self.above[-1] * self._left
        length = float(image.norm())
        self.diagonal.append(length)
        if not length > 0:
            self.above.append(0.0)
            return
        self._left = image / length
        following = adjoint(self._left) - length * self.rights[-1]
        span = torch.stack(self.rights)
        for _ in range(2):  # once is not enough to make it orthogonal with rounding
            following = following - (span @ following) @ span
        self._following = following
        self.above.append(float(following.norm()))

    def best(self) -> _Best:
        """The largest singular value of B."""
        matrix = torch.diag(torch.tensor(self.diagonal, dtype=torch.float64))
        matrix += torch.diag(torch.tensor(self.above[:-1], dtype=torch.float64), 1)
        lefts, values, rights = torch.linalg.svd(matrix)
        return _Best(
            value=float(values[0]),
            residual=self.above[-1] * abs(float(lefts[-1, 0])),
            weights=rights[0],
        )

    def combined(self, weights: Tensor) -> Tensor:
        """Sum of the vectors with these weights."""
        span = torch.stack(self.rights)
        return weights.to(span) @ span
