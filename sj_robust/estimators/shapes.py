"""Shapes that replace the derivative of a spike, and surrogates with these shapes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.host import surrogate
from sj_robust.neuron.dlif import Spiking, describe_surrogate
from sj_robust.ops.dlif.config import HOST_NAMES

__all__ = [
    "SHAPES",
    "SHARPNESS",
    "KeepingValues",
    "derivative_of",
    "has_compiled_kernel",
    "host_surrogate",
    "refuse_second_derivative",
]

Sharpness = float | Tensor
Derivative = Callable[[Tensor], Tensor]


def _sigmoid(z: Tensor, alpha: Sharpness) -> Tensor:
    s = (z * alpha).sigmoid_()
    return (1 - s).mul_(s).mul_(alpha)


def _triangle(z: Tensor, alpha: Sharpness) -> Tensor:
    height = 1 - (z * alpha).abs_()
    return height.clamp_min_(0).mul_(alpha)


def _atan(z: Tensor, alpha: Sharpness) -> Tensor:
    squared = (z * alpha).square_()
    return alpha / squared.mul_(math.pi**2 / 2).add_(2)


def _rectangle(z: Tensor, alpha: Sharpness) -> Tensor:
    inside = (z * alpha).abs_() <= 1
    return inside.to(z.dtype).mul_(alpha).mul_(0.5)


def _exponential(z: Tensor, alpha: Sharpness) -> Tensor:
    size = (z * alpha).abs_()
    return size.neg_().exp_().mul_(alpha).mul_(0.5)


def _gaussian(z: Tensor, alpha: Sharpness) -> Tensor:
    squared = (z * alpha).square_()
    height = squared.mul_(-0.5).exp_().mul_(alpha)
    return height.mul_(1 / math.sqrt(2 * math.pi))


def _straight_through(z: Tensor, alpha: Sharpness) -> Tensor:
    return torch.ones_like(z)


SHAPES: dict[str, Callable[..., Tensor]] = {
    "triangle": _triangle,
    "atan": _atan,
    "sigmoid": _sigmoid,
    "rectangle": _rectangle,
    "exponential": _exponential,
    "gaussian": _gaussian,
    "straight_through": _straight_through,
}
"""Shapes by name, functions of ``z`` and ``alpha``: the area under each is 1, its height grows with
alpha.
"""


def _gaussian_sharpness(share: float) -> float:
    quantile = torch.erfinv(torch.tensor(share, dtype=torch.float64))
    return math.sqrt(2) * float(quantile)


SHARPNESS: dict[str, Callable[[float], float]] = {
    "atan": lambda share: 2 * math.tan(math.pi * share / 2) / math.pi,
    "sigmoid": lambda share: 2 * math.atanh(share),
    "gaussian": _gaussian_sharpness,
    "triangle": lambda share: 1 - math.sqrt(1 - share),
    "rectangle": lambda share: share,
}
"""Sharpness alpha by shape at which a share of the shape's area lies within |z| <= 1."""


def derivative_of(function: Any, z: Tensor) -> Tensor:
    """Derivative of an elementwise surrogate at ``z``, no graph."""
    for shape, host_class in _HOST_CLASSES.items():
        if type(function) is host_class and function.spiking:
            return SHAPES[shape](z, function.alpha)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(function(z).sum(), z)[0]


def refuse_second_derivative() -> None:
    """To be called in a backward pass that has no derivative of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "gradient estimators are differentiable once: create_graph=True would silently lose "
            "the second derivative"
        )


_HOST_CLASSES: dict[str, Any] = {
    kind: getattr(surrogate, name) for kind, name in HOST_NAMES.items() if kind in SHAPES
}


def has_compiled_kernel(function: Any) -> bool:
    """Whether it is a spiking surrogate of SpikingJelly's that fast operators, 2.x's too, know by
    exact class.
    """
    return function is not None and describe_surrogate(function).kind != "custom"


def host_surrogate(shape: str, alpha: float) -> Any | None:
    """SpikingJelly's own surrogate of a shape, on which neurons stay on their fast operators; None
    if it has none.
    """
    made = _HOST_CLASSES.get(shape)
    return None if made is None else made(alpha=alpha)


class KeepingValues(nn.Module):
    """A surrogate with the values of ``function`` and another derivative.

    Examples:
        >>> z = torch.tensor([-1.0, 0.5], requires_grad=True)
        >>> s = KeepingValues(surrogate.ATan(), lambda z: torch.full_like(z, 0.25))(z)
        >>> s.detach(), torch.autograd.grad(s.sum(), z)[0]
        (tensor([0., 1.]), tensor([0.2500, 0.2500]))
    """

    def __init__(self, function: Callable[[Tensor], Tensor], derivative: Derivative) -> None:
        """The parameters of ``function`` are its own, by the same names."""
        super().__init__()
        vars(self)["function"] = function
        if isinstance(function, nn.Module):
            self._parameters = function._parameters
            self._buffers = function._buffers
            self._modules = function._modules
        self.derivative = derivative
        self.spiking = function.spiking if isinstance(function, Spiking) else True

    def forward(self, z: Tensor) -> Tensor:
        """Values at ``z``, on the graph of the other derivative."""
        # torch's apply
        values: Tensor = _ReplacedFunction.apply(  # type: ignore[no-untyped-call]
            z, self.function, self.derivative
        )
        return values


class _ReplacedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, function: Callable[[Tensor], Tensor], derivative: Derivative
    ) -> Tensor:
        ctx.save_for_backward(z)
        ctx.derivative = derivative
        return function(z)

    @staticmethod
    def backward(ctx: Any, grad_spike: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        (z,) = ctx.saved_tensors
        return grad_spike * ctx.derivative(z), None, None
