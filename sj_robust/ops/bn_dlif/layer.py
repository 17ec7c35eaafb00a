"""One call of batch norm, DLIF and pooling: its constants, how its tensors lie, and what a backend
provides for it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import Inputs, Planes, state_dtype
from sj_robust.ops.surrogate import Surrogate

__all__ = [
    "Kernels",
    "Layer",
    "NormTensors",
    "StageConfig",
    "StageGradients",
    "StageOutputGradients",
    "StageOutputs",
    "dense",
    "memory_format",
]


@dataclass(frozen=True)
class StageConfig:
    """Constants of a call beside those of its neurons.

    Attributes:
        statistics: Of the ``batch``, ``running`` ones, or None without batch norm.
        eps: Added to the variance.
        average_pool: Whether spikes are averaged over 2x2 neurons.
        channels_last: Whether every step lies in memory in that order.
        backend: Name of the kernels.
    """

    statistics: str | None
    eps: float
    average_pool: bool
    channels_last: bool
    backend: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The constants as a registered operator takes them."""
        return {
            "statistics": self.statistics,
            "eps": self.eps,
            "average_pool": self.average_pool,
            "channels_last": self.channels_last,
            "backend": self.backend,
        }

    @property
    def layout(self) -> torch.memory_format:
        """The order in which every step lies in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def planes(self, x_seq: Tensor) -> Planes:
        """How a step of these currents lies in memory."""
        height, width = x_seq.shape[3:] if x_seq.ndim == 5 else (x_seq.shape[3:].numel(), 1)
        return Planes(
            channels=x_seq.shape[2],
            height=height,
            width=width,
            channels_last=self.channels_last,
            pool=self.average_pool,
        )

    def step(self, x_seq: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for one step of the shape of those of ``x_seq``."""
        shape, device = x_seq.shape[1:], x_seq.device
        return torch.empty(shape, dtype=dtype, device=device, memory_format=self.layout)

    def steps(self, x_seq: Tensor, T: int, dtype: torch.dtype, *, pooled: bool = False) -> Tensor:
        """Room for T of them, or of the means of their 2x2 neurons."""
        N, C, *plane = x_seq.shape[1:]
        if pooled:
            plane = [size // 2 for size in plane]
        shape, device = (T * N, C, *plane), x_seq.device
        room = torch.empty(shape, dtype=dtype, device=device, memory_format=self.layout)
        return room.view(T, N, C, *plane)

    def room_for_outputs(
        self, x: Tensor, T: int, *, store_v_seq: bool, store_current: bool
    ) -> "StageOutputs":
        """Outputs of T steps like those of ``x``, to be filled."""
        dtype = state_dtype(x)
        return StageOutputs(
            spike_seq=self.steps(x, T, x.dtype, pooled=self.average_pool),
            v=self.step(x, dtype),
            v_seq=self.steps(x, T, dtype) if store_v_seq else None,
            current=self.steps(x, T, dtype) if store_current else None,
        )

    def room_for_gradients(
        self, x: Tensor, T: int, *, needs_x: bool, needs_v_init: bool
    ) -> "StageGradients":
        """Gradients to be filled; without batch norm that of ``x`` is always there."""
        dtype = state_dtype(x)
        has_x = needs_x or self.statistics is None
        return StageGradients(
            x=self.steps(x, len(x), x.dtype) if has_x else None,
            input_gain=torch.empty(T, dtype=dtype, device=x.device),
            v_init=self.step(x, dtype) if needs_v_init else None,
        )


class Layer(NamedTuple):
    """What kernels run over; the steps may all be the same one in memory.

    Moments are mean, variance, scale and offset per channel, [4, C] in float64, or None without
    batch norm.
    """

    inputs: Inputs
    planes: Planes
    moments: Tensor | None = None


class NormTensors(NamedTuple):
    """Tensors of a batch norm, each [C] or None; without running ones the batch has its own."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


class StageOutputs(NamedTuple):
    """Spikes or their means, last potential, potentials and currents if asked for."""

    spike_seq: Tensor
    v: Tensor
    v_seq: Tensor | None
    current: Tensor | None


class StageOutputGradients(NamedTuple):
    """Gradients of those; one that is None is zero."""

    spike_seq: Tensor
    v: Tensor | None
    v_seq: Tensor | None
    current: Tensor | None


class StageGradients(NamedTuple):
    """Gradients to be filled, where they are there.

    With g the gradient of a current: ``x``, ``g * scale`` plus, where slopes [2, C] are given, ``(x
    - mean) * slopes[0] + slopes[1]``; ``x_total``, the sum of ``g * scale`` over time;
    ``channel_sums`` [2, C], those of g and g (x - mean).
    """

    x: Tensor | None
    x_total: Tensor | None = None
    channel_sums: Tensor | None = None
    input_gain: Tensor | None = None
    v_init: Tensor | None = None


class Kernels(Protocol):
    """What a backend provides."""

    def unsupported_reason(self, x_seq: Tensor, surrogate: Surrogate) -> str | None:
        """Why this call cannot run here, or None."""

    def moments(self, layer: Layer, norm: NormTensors, eps: float) -> Tensor:
        """Those of a layer."""

    def forward(self, layer: Layer, outputs: StageOutputs) -> None:
        """Fill the outputs."""

    def backward(
        self,
        layer: Layer,
        grads: StageOutputGradients,
        found: StageGradients,
        slopes: Tensor | None = None,
    ) -> None:
        """Fill the gradients."""

    def finish(
        self, sums: Tensor, moments: Tensor, eps: float, count: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and bias [2, C], and for statistics of a batch of ``count`` values
        the slopes [2, C].
        """


def memory_format(x_seq: Tensor) -> torch.memory_format | None:
    """The order in which every step lies in memory without gaps, if it is one that a kernel
    knows.
    """
    if x_seq[0].is_contiguous():
        return torch.contiguous_format
    if x_seq.ndim == 5 and x_seq[0].is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def dense(x_seq: Tensor, layout: torch.memory_format) -> Tensor:
    """The sequence without gaps, every step in this order; the same tensor where it is that
    already.
    """
    if layout == torch.contiguous_format:
        return x_seq.contiguous()
    return x_seq.flatten(0, 1).contiguous(memory_format=layout).view(x_seq.shape)
