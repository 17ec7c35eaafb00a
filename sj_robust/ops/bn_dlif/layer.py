"""One call of batch norm, DLIF and pooling: its constants, how its tensors lie, and what a backend
provides for it.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import DLIFConfig, Planes
from sj_robust.ops.surrogate import Surrogate

__all__ = ["Kernels", "Layer", "StageConfig", "dense", "memory_format"]


@dataclass(frozen=True)
class StageConfig:
    """Constants of a call.

    Attributes:
        neuron: Those of the neurons.
        statistics: Of the ``batch``, ``running`` ones, or None without batch norm.
        eps: Added to the variance.
        average_pool: Whether spikes are averaged over 2x2 neurons.
        channels_last: Whether every step lies in memory in that order.
        backend: Name of the kernels.
    """

    neuron: DLIFConfig
    statistics: str | None
    eps: float
    average_pool: bool
    channels_last: bool
    backend: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The constants as a registered operator takes them."""
        return {
            **self.neuron.arguments,
            "statistics": self.statistics,
            "eps": self.eps,
            "average_pool": self.average_pool,
            "channels_last": self.channels_last,
            "backend": self.backend,
        }

    @classmethod
    @functools.lru_cache
    def of(
        cls,
        *,
        statistics: str | None,
        eps: float,
        average_pool: bool,
        channels_last: bool,
        backend: str,
        **neuron: Any,
    ) -> "StageConfig":
        """The inverse of :attr:`arguments`."""
        return cls(
            neuron=DLIFConfig.of(**neuron),
            statistics=statistics,
            eps=eps,
            average_pool=average_pool,
            channels_last=channels_last,
            backend=backend,
        )

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
        return torch.empty(
            x_seq.shape[1:], dtype=dtype, device=x_seq.device, memory_format=self.layout
        )

    def steps(self, x_seq: Tensor, T: int, dtype: torch.dtype, *, pooled: bool = False) -> Tensor:
        """Room for T of them, or of the means of their 2x2 neurons."""
        N, C, *plane = x_seq.shape[1:]
        if pooled:
            plane = [size // 2 for size in plane]
        room = torch.empty(
            (T * N, C, *plane), dtype=dtype, device=x_seq.device, memory_format=self.layout
        )
        return room.view(T, N, C, *plane)


class Layer(NamedTuple):
    """A sequence that kernels run over; its steps may all be the same one in memory.

    Moments are mean, variance, scale and offset per channel, [4, C] in float64, or None without
    batch norm.
    """

    x_seq: Tensor
    config: DLIFConfig
    planes: Planes
    moments: Tensor | None = None


class Kernels(Protocol):
    """What a backend provides. What a call does not have is None."""

    def unsupported_reason(self, x_seq: Tensor, surrogate: Surrogate) -> str | None:
        """Why this call cannot run here, or None."""

    def moments(
        self,
        layer: Layer,
        *,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Those of a layer, each of the others [C]; without running ones from the batch."""

    def forward(
        self,
        layer: Layer,
        *,
        input_gain: Tensor,
        v_init: Tensor | None,
        spike_seq: Tensor,
        v_last: Tensor,
        v_seq: Tensor | None,
        current_seq: Tensor | None,
    ) -> None:
        """Read the first two of these tensors, fill the others."""

    def backward(
        self,
        layer: Layer,
        slopes: Tensor | None = None,
        *,
        input_gain: Tensor,
        v_init: Tensor | None,
        grad_spike_seq: Tensor,
        grad_v_last: Tensor | None,
        grad_v_seq: Tensor | None,
        grad_current_seq: Tensor | None,
        grad_x_seq: Tensor | None,
        grad_x_total: Tensor | None = None,
        channel_sums: Tensor | None = None,
        grad_input_gain: Tensor | None = None,
        grad_v_init: Tensor | None = None,
    ) -> None:
        """Read gradients of the outputs, fill those of the inputs.

        With g the gradient of a current: ``grad_x_seq``, ``g * scale`` plus, where slopes [2, C]
        are given, ``(x - mean) * slopes[0] + slopes[1]``; ``grad_x_total``, the sum of ``g *
        scale`` over time; ``channel_sums`` [2, C], those of g and g (x - mean).
        """

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
