"""Constants, inputs and outputs of a DLIF layer, and its spike function."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from sj_robust.ops.limits import at_least

__all__ = [
    "HOST_NAMES",
    "DLIFConfig",
    "InputGradients",
    "Inputs",
    "OutputGradients",
    "Outputs",
    "Planes",
    "Surrogate",
    "SurrogateKind",
    "check_arguments",
    "import_failure",
    "initial_potential",
    "is_repeated",
    "no_gpu_reason",
    "state_dtype",
]

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


@dataclass(frozen=True)
class DLIFConfig:
    """Constants of a DLIF layer: decay in (0, 1], threshold, reset (None is soft), surrogate,
    detach.
    """

    decay: float
    v_threshold: float
    v_reset: float | None
    surrogate: Surrogate
    detach_reset: bool

    @property
    def leak_current(self) -> float:
        """Constant (1 - decay) * v_reset that pulls a hard-reset neuron back to v_reset."""
        return (1 - self.decay) * self.v_reset if self.v_reset else 0.0

    @property
    def numbers(self) -> dict[str, float]:
        """The constants that every kernel takes as numbers; a soft reset has a potential of 0."""
        return {
            "decay": float(self.decay),
            "leak_current": float(self.leak_current),
            "v_threshold": float(self.v_threshold),
            "v_reset": float(self.v_reset or 0.0),
        }

    @property
    def reset(self) -> str:
        """What a spike does to the potential, in a kernel's word: ``zero``, ``value`` or
        ``subtraction``.
        """
        if self.v_reset is None:
            return "subtraction"
        return "value" if self.v_reset else "zero"

    @property
    def arguments(self) -> dict[str, Any]:
        """The constants as a registered operator takes them."""
        return {
            "decay": self.decay,
            "v_threshold": self.v_threshold,
            "v_reset": self.v_reset,
            "surrogate": self.surrogate.name,
            "alpha": self.surrogate.alpha,
            "detach_reset": self.detach_reset,
        }

    @classmethod
    def of(cls, *, surrogate: str, alpha: float, **constants: Any) -> "DLIFConfig":
        """The inverse of :attr:`arguments`."""
        return cls(surrogate=Surrogate.named(surrogate, alpha), **constants)


class Inputs(NamedTuple):
    """What a call takes: currents [T, *], gain [T], potential before the first step [*] (None:
    reset), constants.
    """

    x_seq: Tensor
    input_gain: Tensor
    v_init: Tensor | None
    config: DLIFConfig


class Outputs(NamedTuple):
    """Spikes [T, *], last potential [*], potentials after every reset [T, *] if asked for."""

    spike_seq: Tensor
    v: Tensor
    v_seq: Tensor | None


class OutputGradients(NamedTuple):
    """Gradients of spikes [T, *], last potential [*] and potentials [T, *].

    One that is None is zero; whether its product with an infinite potential is NaN or zero is left
    open.
    """

    spike_seq: Tensor
    v: Tensor | None = None
    v_seq: Tensor | None = None


class InputGradients(NamedTuple):
    """Gradients of currents [T, *], gain [T] and first potential [*], which nobody may need."""

    x_seq: Tensor
    input_gain: Tensor
    v_init: Tensor | None


class Planes(NamedTuple):
    """How a step lies in memory where batch norm or pooling belong to the call: [N, C, H, W], or
    [N, H, W, C].
    """

    channels: int
    height: int
    width: int
    channels_last: bool
    pool: bool


def is_repeated(x_seq: Tensor) -> bool:
    """Whether every step is the same one in memory."""
    return len(x_seq) > 1 and x_seq.stride(0) == 0


def state_dtype(x_seq: Tensor) -> torch.dtype:
    """Dtype of potentials, gains and arithmetic: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if x_seq.dtype == torch.float64 else torch.float32


def initial_potential(x_seq: Tensor, config: DLIFConfig) -> Tensor:
    """The reset potential (0 for soft reset) in the shape of one time step of ``x_seq``."""
    return torch.full_like(x_seq[0], config.v_reset or 0.0, dtype=state_dtype(x_seq))


def check_arguments(x_seq: Tensor, input_gain: Tensor, v_init: Tensor | None) -> None:
    """Refuse tensors that do not belong together."""
    if not x_seq.is_floating_point():
        raise TypeError(
            f"x_seq must be floating point, got {x_seq.dtype}; convert it with .float()"
        )
    if x_seq.ndim == 0 or x_seq.shape[0] == 0:
        raise ValueError(f"x_seq must be [T, N, *] with T >= 1, got shape {tuple(x_seq.shape)}")
    if input_gain.shape != x_seq.shape[:1]:
        raise ValueError(
            f"input_gain must hold one value per step, [T] = [{x_seq.shape[0]}], got "
            f"{tuple(input_gain.shape)}"
        )
    if v_init is not None and v_init.shape != x_seq.shape[1:]:
        raise ValueError(
            f"v_init must have the shape of one step, {tuple(x_seq.shape[1:])}, got "
            f"{tuple(v_init.shape)}"
        )
    for name, tensor in (("input_gain", input_gain), ("v_init", v_init)):
        if tensor is not None and tensor.device != x_seq.device:
            raise ValueError(
                f"{name} must be on the device of x_seq, {x_seq.device}, got {tensor.device}; move "
                "the network and its input to one device with .to(...)"
            )


def no_gpu_reason() -> str | None:
    """Why no CUDA kernel can run on this machine, whoever wrote it, with the remedy, or None."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm, and the kernel is CUDA"
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return (
            "torch finds no CUDA GPU (torch.cuda.is_available() is False); check the driver with "
            "nvidia-smi"
        )
    return None


def import_failure(
    package: str, module: str, load: Callable[[], object], *, if_missing: str, if_broken: str
) -> str | None:
    """Why a package cannot be imported, with the remedy, told from what really happened."""
    try:
        load()
    except Exception as error:  # a broken installation can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return f"{package} is not installed{if_missing}"
        return (
            f"{package} is installed, but importing it failed with {type(error).__name__}: "
            f"{error}; {if_broken}"
        )
    return None
