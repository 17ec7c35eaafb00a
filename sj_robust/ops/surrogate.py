"""Spike function and surrogate derivative, independent of SpikingJelly."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from sj_robust.ops.limits import at_least

__all__ = ["HOST_NAMES", "NEEDS_GRAPH", "Surrogate", "SurrogateKind"]

SurrogateKind = Literal[
    "triangle", "atan", "sigmoid", "exponential", "soft_sign", "super_spike", "erf", "custom"
]
HOST_NAMES: dict[SurrogateKind, str] = {
    "triangle": "PiecewiseQuadratic",
    "atan": "ATan",
    "sigmoid": "Sigmoid",
    "exponential": "PiecewiseExp",
    "soft_sign": "SoftSign",
    "super_spike": "SuperSpike",
    "erf": "Erf",
}
"""Kinds that every kernel computes by a formula, with the names of SpikingJelly's classes;
0.0.0.0.14 lacks one.

The CUDA text has a struct of each name, and the C++ text knows a kind by its place here.
"""

NEEDS_GRAPH = (
    "has trainable parameters, or may use some, being a function of Python and no nn.Module; only "
    "backend='reference' computes their gradient"
)
"""Why no kernel runs a surrogate that ``needs_graph``, to follow its name."""


@dataclass(frozen=True)
class Surrogate:
    """The spike function of a neuron and the surrogate of its derivative.

    The spike is ``s = 1 if z >= 0 else 0`` with ``z = h - v_threshold``. Its derivative is replaced
    by g(z):

    - ``triangle``: ``max(0, alpha - alpha**2 * |z|)`` (SpikingJelly's ``PiecewiseQuadratic``);
    - ``atan``: ``alpha / 2 / (1 + (pi / 2 * alpha * z)**2)``;
    - ``sigmoid``: ``alpha * sigmoid(alpha * z) * (1 - sigmoid(alpha * z))``;
    - ``exponential``: ``alpha / 2 * exp(-alpha * |z|)`` (``PiecewiseExp``);
    - ``soft_sign``: ``alpha / 2 / (1 + alpha * |z|)**2``;
    - ``super_spike``: ``alpha / (1 + |z|)**2``;
    - ``erf``: ``alpha / sqrt(pi) * exp(-(alpha * z)**2)``;
    - ``custom``: the derivative of ``function`` by automatic differentiation; ``function`` may also
      be a smooth replacement of the spike.

    Args:
        kind: One of the names above.
        alpha: Sharpness, > 0; unused by ``custom``.
        function: A differentiable, elementwise function from z to the spike; required for
            ``custom`` and only allowed there.

    Raises:
        ValueError: If the kind is unknown, ``alpha`` is not a positive finite number, or
            ``function`` is missing for ``custom`` or given for another kind.

    Source: method of Robust Stable SNN (Ding et al., ICML 2024), section 4; SpikingJelly's
        ``surrogate``.

    Examples:
        >>> Surrogate("triangle").derivative(torch.tensor([-2.0, -0.25, 0.0, 0.5]))
        tensor([0.0000, 0.7500, 1.0000, 0.5000])
    """

    kind: SurrogateKind = "triangle"
    alpha: float = 1.0
    function: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Check the description once, so that no kernel has to."""
        if self.kind != "custom" and self.kind not in HOST_NAMES:
            raise ValueError(f"kind must be one of {get_args(SurrogateKind)}, got {self.kind!r}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be finite and > 0, got {self.alpha}")
        if (self.function is None) == (self.kind == "custom"):
            raise ValueError("function must be given for kind='custom' and for no other kind")

    @property
    def name(self) -> str:
        """The kind; for a function, a number by which :meth:`named` finds it while it exists."""
        if self.function is None:
            return self.kind
        name = f"custom {id(self)}"
        _CUSTOM[name] = self
        return name

    @staticmethod
    def named(name: str, alpha: float) -> "Surrogate":
        """The surrogate with a name and a sharpness."""
        return _CUSTOM[name] if name in _CUSTOM else _built_in(name, alpha)

    @property
    def needs_graph(self) -> bool:
        """Whether ``function`` may have gradients besides that of z: a module whose parameters or
        other tensors require one, or a function of Python, which may use tensors from elsewhere.
        """
        function = self.function
        if function is None or not torch.is_grad_enabled():
            return False
        owner = getattr(function, "__self__", None)  # of a method
        if isinstance(function, BuiltinFunctionType) or _is_of_autograd(owner):
            return False
        module = owner if isinstance(owner, nn.Module) else function
        if not isinstance(module, nn.Module):
            return True
        held: list[object] = [*module.parameters(), *module.buffers()]
        for part in module.modules():
            held += vars(part).values()
        return any(isinstance(value, Tensor) and value.requires_grad for value in held)

    def spike(self, z: Tensor) -> Tensor:
        """The spike, with the surrogate gradient; same shape and dtype as ``z``."""
        if self.function is not None:
            return self.function(z)
        # torch leaves apply untyped
        spike: Tensor = _Spike.apply(z, self)  # type: ignore[no-untyped-call]
        return spike

    def derivative(self, z: Tensor) -> Tensor:
        """The surrogate derivative g(z), without a graph; same shape and dtype as ``z``."""
        return self.derivative_(z.clone())

    def derivative_(self, z: Tensor) -> Tensor:
        """As :meth:`derivative`, but ``z`` may be overwritten."""
        alpha = self.alpha
        if self.kind == "triangle":
            fall = z.abs_() if alpha == 1.0 else z.abs_().mul_(alpha * alpha)
            top = torch.full((), alpha, dtype=z.dtype, device=z.device)
            if fall.requires_grad:
                return at_least(top - fall, 0.0)
            return torch.sub(top, fall, out=fall).clamp_min_(0.0)
        if self.kind == "atan":
            return (alpha / 2) / z.mul_(math.pi / 2 * alpha).square_().add_(1)
        if self.kind == "sigmoid":
            s = z.mul_(alpha).sigmoid_()
            return alpha * s * (1 - s)
        if self.kind == "exponential":
            return _times(z.abs_().mul_(-alpha).exp_(), alpha / 2)
        if self.kind == "soft_sign":
            return (alpha / 2) / z.abs_().mul_(alpha).add_(1).square_()
        if self.kind == "super_spike":
            return alpha / z.abs_().add_(1).square_()
        if self.kind == "erf":
            height = alpha / math.sqrt(math.pi)
            return _times(z.mul_(alpha).square_().neg_().exp_(), height)
        assert self.function is not None  # guaranteed by __post_init__
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(self.function(z).sum(), z)[0]


def _is_of_autograd(owner: object) -> bool:
    """Whether it is a class of ``torch.autograd.Function``, which takes tensors as arguments."""
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)


def _times(values: Tensor, factor: float) -> Tensor:
    """The product, in place unless a graph needs the values."""
    return values * factor if values.requires_grad else values.mul_(factor)


_CUSTOM: WeakValueDictionary[str, Surrogate] = WeakValueDictionary()


@functools.lru_cache
def _built_in(kind: SurrogateKind, alpha: float) -> Surrogate:
    return Surrogate(kind, alpha)


class _Spike(torch.autograd.Function):
    """Heaviside step whose backward multiplies by the surrogate derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, surrogate: Surrogate) -> Tensor:
        return (z >= 0).to(z.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Surrogate], output: Tensor) -> None:
        z, ctx.surrogate = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx: Any, grad_spike: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grad_spike * ctx.surrogate.derivative(z), None
