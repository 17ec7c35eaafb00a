"""Constants of a DLIF layer, what a call of it takes and gives, and the few facts every implementation derives."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sj_robust.ops.surrogate import Surrogate

__all__ = ["DLIFConfig", "Inputs", "OutputGradients", "Outputs", "initial_potential", "state_dtype"]


@dataclass(frozen=True)
class DLIFConfig:
    """Constants of a DLIF layer: decay in (0, 1], threshold, reset (None is soft), surrogate, detach."""

    decay: float
    v_threshold: float
    v_reset: float | None
    surrogate: Surrogate
    detach_reset: bool

    @property
    def leak_current(self) -> float:
        """Constant (1 - decay) * v_reset that pulls a hard-reset neuron back to v_reset."""
        return (1 - self.decay) * self.v_reset if self.v_reset else 0.0


class Inputs(NamedTuple):
    """What a call takes: currents [T, *], gain [T], potential before the first step [*] (None: reset), constants."""

    x_seq: Tensor
    input_gain: Tensor
    v_init: Tensor | None
    config: DLIFConfig


class OutputGradients(NamedTuple):
    """Gradients of spikes [T, *], last potential [*] and potentials [T, *].

    One that is None is zero; whether its product with an infinite potential is NaN or zero is left open.
    """

    spike_seq: Tensor
    v: Tensor | None = None
    v_seq: Tensor | None = None


Outputs = tuple[Tensor, Tensor, Tensor | None]
"""Spikes [T, *], last potential [*], potentials after every reset [T, *] if asked for."""


def state_dtype(x_seq: Tensor) -> torch.dtype:
    """Dtype of potentials, gains and arithmetic: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if x_seq.dtype == torch.float64 else torch.float32


def initial_potential(x_seq: Tensor, config: DLIFConfig) -> Tensor:
    """The reset potential (0 for soft reset) in the shape of one time step of ``x_seq``."""
    return torch.full_like(x_seq[0], config.v_reset or 0.0, dtype=state_dtype(x_seq))
