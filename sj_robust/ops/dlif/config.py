"""Constants of a DLIF layer, what a call of it takes and gives, and the few facts every
implementation derives.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sj_robust.ops.surrogate import Surrogate

__all__ = [
    "DLIFConfig",
    "Inputs",
    "OutputGradients",
    "Outputs",
    "Planes",
    "check_arguments",
    "check_devices",
    "initial_potential",
    "is_repeated",
    "no_gpu_reason",
    "on_one_device",
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


class OutputGradients(NamedTuple):
    """Gradients of spikes [T, *], last potential [*] and potentials [T, *].

    One that is None is zero; whether its product with an infinite potential is NaN or zero is left
    open.
    """

    spike_seq: Tensor
    v: Tensor | None = None
    v_seq: Tensor | None = None


Outputs = tuple[Tensor, Tensor, Tensor | None]
"""Spikes [T, *], last potential [*], potentials after every reset [T, *] if asked for."""


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


# What the kernels for CUDA share.


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


def check_devices(x_seq: Tensor, input_gain: Tensor, v_init: Tensor | None) -> None:
    """Refuse tensors apart: a pointer to another device's memory would crash the process."""
    for name, tensor in (("input_gain", input_gain), ("v_init", v_init)):
        if tensor is not None and tensor.device != x_seq.device:
            raise ValueError(
                f"{name} must be on the device of x_seq, {x_seq.device}, got {tensor.device}"
            )


def on_one_device(inputs: Inputs) -> Inputs:
    """The same, checked to be there and contiguous."""
    x_seq, input_gain, v_init, config = inputs
    check_devices(x_seq, input_gain, v_init)
    return Inputs(
        x_seq, input_gain.contiguous(), None if v_init is None else v_init.contiguous(), config
    )
