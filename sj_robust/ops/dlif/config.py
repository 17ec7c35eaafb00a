"""Constants, inputs and outputs of a DLIF layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sj_robust.ops.surrogate import Surrogate

__all__ = [
    "DLIFConfig",
    "InputGradients",
    "Inputs",
    "OutputGradients",
    "Outputs",
    "Planes",
    "check_arguments",
    "import_failure",
    "initial_potential",
    "is_repeated",
    "no_gpu_reason",
    "state_dtype",
]


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
