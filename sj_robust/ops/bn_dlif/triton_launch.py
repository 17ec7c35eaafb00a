"""Launches ``triton_kernel.py``.

As with DLIF alone, under ``TRITON_INTERPRET=1`` the kernels run on the CPU.
"""

import functools
import importlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif.layer import (
    Layer,
    NormTensors,
    StageGradients,
    StageOutputGradients,
    StageOutputs,
)
from sj_robust.ops.dlif import triton_launch as dlif
from sj_robust.ops.dlif.config import DLIFConfig, Planes, is_repeated
from sj_robust.ops.surrogate import Surrogate

__all__ = ["Layout", "backward", "cut", "finish", "forward", "moments", "unsupported_reason"]

_BYTES_IN_A_ROW = 128  # of neighbouring channels that a program takes
_BYTES_AT_ONCE = 16  # that a thread loads of a tensor
# of a program of the statistics; and so many programs before any has a second tile
_MOST_TILES, _PROGRAMS = 32, 4096
_CHANNELS_AT_ONCE = 128
_INT32 = 1 << 30  # with room for what lies behind the last neuron


def unsupported_reason(x_seq: Tensor, surrogate: Surrogate) -> str | None:
    """See :class:`sj_robust.ops.bn_dlif.layer.Kernels`."""
    reason = dlif.unsupported_reason(x_seq, surrogate)
    if reason is not None:
        return reason
    if x_seq[0, 0].numel() >= _INT32 or x_seq.numel() // x_seq.shape[2] >= _INT32:
        return (
            "one pass needs less than 2**30 numbers in a sample and in a channel, got shape "
            f"{tuple(x_seq.shape)}"
        )
    return None


@dataclass(frozen=True)
class Layout:
    """How the tiles of a kernel lie in a step: compile-time arguments of ``triton_kernel.py``.

    ``UNIT`` is a power of two that divides the width of the planes, or without pooling their size.
    """

    UNIT: int
    BLOCK: int
    CHANNELS: int
    POOL: bool
    LAST: bool

    @classmethod
    def of(cls, planes: Planes, dtype: torch.dtype, positions: int) -> "Layout":
        """A tile of so many positions."""
        plane, last = planes.height * planes.width, _is_last(planes)
        channels = (
            min(_BYTES_IN_A_ROW // dtype.itemsize, _power_above(planes.channels), positions)
            if last
            else 1
        )
        width = planes.width if planes.pool else plane
        unit = 1 if last else min(16, width & -width)
        return cls(unit, positions // channels, channels, planes.pool, last)

    def blocks(self, samples: int, planes: Planes) -> int:
        """How many tiles cover all positions of a channel."""
        columns, rows = planes.width, planes.height
        if self.POOL:
            columns, rows = (columns + 1) // 2 * (1 if self.LAST else 2), (rows + 1) // 2
        return -(-samples * rows * columns // self.BLOCK)


def cut(
    kernel: str, dtype: torch.dtype, steps: int, config: DLIFConfig, planes: Planes
) -> tuple[Layout, dict[str, Any]]:
    """Tiles of ``bn_dlif_forward``, ``bn_dlif_backward`` or ``bn_statistics`` and all its
    compile-time arguments.
    """
    if kernel == "bn_statistics":
        neurons = 32 * dlif.FORWARD_WARPS * _BYTES_AT_ONCE // dtype.itemsize
        layout = Layout.of(planes._replace(pool=False), dtype, neurons)
        return layout, {name: value for name, value in asdict(layout).items() if name != "POOL"}
    # without vectors half precision has no wider accesses to gain from more neurons
    vectors = _has_vectors(planes)
    make = dlif.forward_plan if kernel == "bn_dlif_forward" else dlif.backward_plan
    plan = make(dtype if vectors else torch.float32, steps, config)
    positions = plan.BLOCK
    if kernel == "bn_dlif_backward" and plan.LATER:
        # the sums over a channel are kept in registers from one segment to the next, and without
        # vectors an address for every neuron
        positions //= 2 if vectors else 4
    if kernel == "bn_dlif_backward" and planes.pool:
        # forward a thread has whole windows, to add them up
        positions //= 4 if _is_last(planes) else 2
    layout = Layout.of(planes, dtype, positions)
    return layout, {**asdict(plan), **asdict(layout)}


def moments(layer: Layer, norm: NormTensors, eps: float) -> Tensor:
    """See :class:`sj_robust.ops.bn_dlif.layer.Kernels`."""
    x_seq, planes = layer.inputs.x_seq, layer.planes
    steps = x_seq[:1] if is_repeated(x_seq) else x_seq
    found = x_seq.new_empty((4, planes.channels), dtype=torch.float64)
    of_norm = norm._asdict().items()
    _for_each_channel(
        _kernels().bn_moments,
        planes.channels,
        constants={"EPS": eps, "LAST": _is_last(planes)},
        x_seq=steps,
        sums=_sums(steps, layer) if norm.running_mean is None else None,
        **{name: None if one is None else one.contiguous() for name, one in of_norm},
        moments=found,
        count=steps.numel() // planes.channels,
        plane=planes.height * planes.width,
    )
    return found


def forward(layer: Layer, outputs: StageOutputs) -> None:
    """See :class:`sj_robust.ops.bn_dlif.layer.Kernels`."""
    inputs, planes, moments = layer
    T, N = inputs.x_seq.shape[:2]
    layout, constants = cut("bn_dlif_forward", inputs.x_seq.dtype, T, inputs.config, planes)
    dlif.launch(
        _kernels().bn_dlif_forward,
        _programs(N, planes, layout),
        constants=constants,
        warps=dlif.FORWARD_WARPS,
        **dlif.given(inputs),
        moments=moments,
        spike_seq=outputs.spike_seq,
        v_last=outputs.v,
        v_seq=outputs.v_seq,
        current_seq=outputs.current,
        **_sizes(layer, layout),
    )


def backward(
    layer: Layer,
    grads: StageOutputGradients,
    found: StageGradients,
    slopes: Tensor | None = None,
) -> None:
    """See :class:`sj_robust.ops.bn_dlif.layer.Kernels`."""
    inputs, planes, moments = layer
    x_seq, config = inputs.x_seq, inputs.config
    T, N = x_seq.shape[:2]
    layout, constants = cut("bn_dlif_backward", x_seq.dtype, T, config, planes)
    new = functools.partial(torch.empty, dtype=torch.float32, device=x_seq.device)
    programs, blocks = _programs(N, planes, layout), layout.blocks(N, planes)
    partial_sums = None if found.channel_sums is None else new((blocks, 2, planes.channels))
    partial_grad_gain = None if found.input_gain is None else new((programs, T))
    later, sizes = constants["LATER"], _sizes(layer, layout)
    dlif.launch(
        _kernels().bn_dlif_backward,
        programs,
        constants=constants,
        warps=dlif.BACKWARD_WARPS,
        **dlif.given(inputs),
        alpha=float(config.surrogate.alpha),
        moments=moments,
        slopes=slopes,
        grad_spike_seq=grads.spike_seq,
        grad_v_last=grads.v,
        grad_v_seq=grads.v_seq,
        grad_current_seq=grads.current,
        grad_x_seq=found.x,
        grad_x_total=found.x_total,
        grad_v_init=found.v_init,
        partial_sums=partial_sums,
        partial_grad_gain=partial_grad_gain,
        checkpoints=new((later, sizes["neurons"])) if later else None,
        **sizes,
        x_row_again=sizes["x_row"],
    )
    if partial_sums is not None and found.channel_sums is not None:
        found.channel_sums.copy_(partial_sums.sum(0, dtype=torch.float64))
    if partial_grad_gain is not None and found.input_gain is not None:
        found.input_gain.copy_(partial_grad_gain.sum(0, dtype=torch.float64))


def finish(
    sums: Tensor, moments: Tensor, eps: float, count: int | None
) -> tuple[Tensor, Tensor | None]:
    """See :class:`sj_robust.ops.bn_dlif.layer.Kernels`."""
    grad_norm = torch.empty_like(sums)
    slopes = None if count is None else torch.empty_like(sums)
    _for_each_channel(
        _kernels().bn_finish,
        sums.shape[1],
        constants={"EPS": eps},
        sums=sums,
        moments=moments,
        grad_norm=grad_norm,
        slopes=slopes,
        count=count or 1,
    )
    return grad_norm, slopes


def _sums(steps: Tensor, layer: Layer) -> Tensor:
    """Over a channel, of the distance to its first number and of the square of that [2, C], in
    float64.
    """
    planes = layer.planes
    samples = steps.shape[0] * steps.shape[1]
    layout, constants = cut("bn_statistics", steps.dtype, 1, layer.inputs.config, planes)
    blocks, of_channels = layout.blocks(samples, planes), -(-planes.channels // layout.CHANNELS)
    # few kernels to compile
    count = min(_MOST_TILES, _power_above(1 + blocks * of_channels // _PROGRAMS))
    programs = -(-blocks // count)
    partial = torch.empty((programs, 2, planes.channels), dtype=torch.float32, device=steps.device)
    dlif.launch(
        _kernels().bn_statistics,
        programs * of_channels,
        constants={**constants, "COUNT": count},
        warps=dlif.FORWARD_WARPS,
        x_seq=steps,
        partial_sums=partial,
        samples=samples,
        channels=planes.channels,
        units=planes.height * planes.width // layout.UNIT,
    )
    return partial.sum(0, dtype=torch.float64)


def _for_each_channel(
    kernel: Any, channels: int, *, constants: dict[str, Any], **arguments: Any
) -> None:
    dlif.launch(
        kernel,
        -(-channels // _CHANNELS_AT_ONCE),
        constants={**constants, "BLOCK": _CHANNELS_AT_ONCE},
        warps=4,
        **arguments,
        channels=channels,
    )


def _programs(samples: int, planes: Planes, layout: Layout) -> int:
    return layout.blocks(samples, planes) * -(-planes.channels // layout.CHANNELS)


def _sizes(layer: Layer, layout: Layout) -> dict[str, int]:
    """Samples, channels, height and width in units; and strides of time: of x, of what has its
    shape, of the means.
    """
    x_seq, planes = layer.inputs.x_seq, layer.planes
    height, width = planes.height, planes.width
    neurons = x_seq[0].numel()
    means = x_seq.shape[1] * planes.channels * (height // 2) * (width // 2)
    if not planes.pool:  # a plane is one line
        height, width = 1, height * width
    return {
        "samples": x_seq.shape[1],
        "channels": planes.channels,
        "height": height,
        "units": width // layout.UNIT,
        "x_row": 0 if is_repeated(x_seq) else neurons,
        "neurons": neurons,
        "window_row": means if planes.pool else neurons,
    }


def _has_vectors(planes: Planes) -> bool:
    """Whether four neighbours in memory or more are known to be aligned; Triton knows of multiples
    of 16.
    """
    if _is_last(planes):
        return planes.channels % 16 == 0
    return (planes.width if planes.pool else planes.height * planes.width) % 4 == 0


def _is_last(planes: Planes) -> bool:
    return planes.channels_last or planes.height * planes.width == 1


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _kernels() -> Any:
    return importlib.import_module("sj_robust.ops.bn_dlif.triton_kernel")
