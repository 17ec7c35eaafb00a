"""One call of batch norm, DLIF and pooling: constants, memory layout, inputs and outputs."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import Inputs, Planes, state_dtype

__all__ = [
    "BatchNorm",
    "Layer",
    "NormTensors",
    "StageConfig",
    "StageGradients",
    "StageOutputGradients",
    "StageOutputs",
    "dense",
    "memory_format",
    "repeat_step",
    "repeated_step",
]


@dataclass(frozen=True)
class BatchNorm:
    """What ``torch.nn.functional.batch_norm`` takes besides its input; every tensor is [C] or None.

    Args:
        weight: Scale per channel, or None for 1.
        bias: Offset per channel, or None for 0.
        running_mean: Updated in place when batch statistics are used; needed when they are not.
        running_var: As ``running_mean``.
        use_batch_statistics: Whether mean and variance are those of this batch (training).
        momentum: Share of this batch in the running statistics.
        eps: Added to the variance.

    Raises:
        ValueError: If neither batch nor running statistics are there to use.

    Examples:
        >>> BatchNorm(None, None, None, None, use_batch_statistics=True).eps
        1e-05
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    use_batch_statistics: bool
    momentum: float = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        """Check that there are statistics to use."""
        if not self.use_batch_statistics and (
            self.running_mean is None or self.running_var is None
        ):
            raise ValueError(
                "running_mean and running_var must be given when use_batch_statistics is False, "
                "got None; pass them, or use_batch_statistics=True"
            )


@dataclass(frozen=True)
class StageConfig:
    """Constants of a call, except those of its neurons.

    Attributes:
        statistics: ``"batch"`` if batch norm takes mean and variance of the batch, ``"running"`` if
            it takes the running ones, None without batch norm.
        eps: Added to the variance.
        average_pool: Whether spikes are averaged over 2x2 neurons.
        channels_last: Whether a time step is channels last in memory.
    """

    statistics: str | None
    eps: float
    average_pool: bool
    channels_last: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """The constants as a registered operator takes them."""
        return vars(self)

    @property
    def layout(self) -> torch.memory_format:
        """Memory format of a time step."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def planes(self, x_seq: Tensor) -> Planes:
        """Sizes and layout of a time step of the currents [T, N, C, *]."""
        if x_seq.ndim == 5:
            height, width = x_seq.shape[3:]
        else:
            height = x_seq.shape[3:].numel()
            width = 1
        return Planes(
            channels=x_seq.shape[2],
            height=height,
            width=width,
            channels_last=self.channels_last,
            pool=self.average_pool,
        )

    def step(self, x_seq: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised tensor for one time step, in the shape of those of ``x_seq``."""
        shape, device = x_seq.shape[1:], x_seq.device
        return torch.empty(shape, dtype=dtype, device=device, memory_format=self.layout)

    def steps(self, x_seq: Tensor, T: int, dtype: torch.dtype, *, pooled: bool = False) -> Tensor:
        """Uninitialised tensor for T time steps; their planes are half as high and wide if
        ``pooled``.
        """
        N, C, *plane = x_seq.shape[1:]
        if pooled:
            plane = [size // 2 for size in plane]
        shape, device = (T * N, C, *plane), x_seq.device
        room = torch.empty(shape, dtype=dtype, device=device, memory_format=self.layout)
        return room.view(T, N, C, *plane)

    def room_for_outputs(
        self, x: Tensor, T: int, *, store_v_seq: bool, store_current: bool
    ) -> "StageOutputs":
        """Uninitialised outputs of T steps in the shape of those of ``x``."""
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
        """Uninitialised gradients; without batch norm that of ``x`` is always among them."""
        dtype = state_dtype(x)
        has_x = needs_x or self.statistics is None
        return StageGradients(
            x=self.steps(x, len(x), x.dtype) if has_x else None,
            input_gain=torch.empty(T, dtype=dtype, device=x.device),
            v_init=self.step(x, dtype) if needs_v_init else None,
        )


class Layer(NamedTuple):
    """Inputs of the kernels.

    Attributes:
        inputs: Currents, input gain, first potential and constants of the neurons; all time steps
            may share the memory of one.
        planes: Sizes and layout of a time step.
        moments: Mean, variance, scale and offset per channel, [4, C] in float64; None without batch
            norm.
    """

    inputs: Inputs
    planes: Planes
    moments: Tensor | None = None


class NormTensors(NamedTuple):
    """Tensors of a batch norm, each [C] or None.

    Mean and variance are those of the batch if the running ones are None.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


class StageOutputs(NamedTuple):
    """Outputs of a call.

    Attributes:
        spike_seq: Spikes of all steps, averaged over 2x2 neurons with pooling.
        v: Potential after the last step.
        v_seq: Potentials after all steps; None if not asked for.
        current: Output of the batch norm; None if not asked for.
    """

    spike_seq: Tensor
    v: Tensor
    v_seq: Tensor | None
    current: Tensor | None


class StageOutputGradients(NamedTuple):
    """Gradients with respect to the outputs; None stands for zero."""

    spike_seq: Tensor
    v: Tensor | None
    v_seq: Tensor | None
    current: Tensor | None


class StageGradients(NamedTuple):
    """Gradients with respect to the inputs, to be filled by a kernel; None ones are left out.

    Attributes:
        x: ``g * scale``, with g the gradient with respect to the current (the output of the batch
            norm); with slopes [2, C] plus ``(x - mean) * slopes[0] + slopes[1]``.
        x_total: Sum of ``g * scale`` over time.
        channel_sums: Sums of g and of ``g * (x - mean)`` per channel, [2, C].
        input_gain: With respect to the input gain [T].
        v_init: With respect to the first potential.
    """

    x: Tensor | None
    x_total: Tensor | None = None
    channel_sums: Tensor | None = None
    input_gain: Tensor | None = None
    v_init: Tensor | None = None


def memory_format(x_seq: Tensor) -> torch.memory_format | None:
    """Memory format of every time step; None if it has gaps or an order that no kernel knows."""
    if x_seq[0].is_contiguous():
        return torch.contiguous_format
    if x_seq.ndim == 5 and x_seq[0].is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def dense(x_seq: Tensor, layout: torch.memory_format) -> Tensor:
    """The sequence without gaps, every step in a memory format; the same tensor if it is so
    already.
    """
    if layout == torch.contiguous_format:
        return x_seq.contiguous()
    return x_seq.flatten(0, 1).contiguous(memory_format=layout).view(x_seq.shape)


def repeat_step(x: Tensor, T: int) -> Tensor:
    """Repeat one step over time without a copy; batch norm and DLIF in one pass return its gradient
    alone.

    Equation: ``x_seq[t] = x`` and ``grad x = sum_t grad x_seq[t]``, which otherwise would be
    written out T times and read again. The gradient of the sequence itself is then never computed,
    so a hook on that tensor is not called.

    Args:
        x: Currents of one step, [1, N, *].
        T: Number of time steps.

    Returns:
        The sequence, [T, N, *].

    Source: direct encoding of Ding et al. (ICML 2024), section 5, whose first current is the same
        at every step.

    Examples:
        >>> import torch
        >>> repeat_step(torch.zeros(1, 2, 3), 4).shape
        torch.Size([4, 2, 3])
    """
    x_seq = x.expand(T, *x.shape[1:])
    # a note that any operation on the tensor loses
    x_seq.single_step = x  # type: ignore[attr-defined]
    return x_seq


def repeated_step(x_seq: Tensor) -> Tensor | None:
    """The step that :func:`repeat_step` repeated, if this is its result."""
    return getattr(x_seq, "single_step", None)
