"""Launches ``triton_kernel.py``: batch norm, DLIF and 2x2 average pooling on CUDA; see
``stage.py``.

As with DLIF alone, under ``TRITON_INTERPRET=1`` the kernels run on the CPU.
"""

import functools
import importlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.dlif import triton_launch as dlif
from sj_robust.ops.dlif.config import DLIFConfig, Planes, Tensors, is_repeated
from sj_robust.ops.surrogate import Surrogate

__all__ = ["Layout", "backward", "cut", "finish", "forward", "moments", "unsupported_reason"]

_BYTES_IN_A_ROW = 128  # of neighbouring channels that a program takes
_BYTES_AT_ONCE = 16  # that a thread loads of a tensor
_MOST_TILES, _PROGRAMS = (
    32,
    4096,
)  # of a program of the statistics; and so many programs before any has a second tile
_CHANNELS_AT_ONCE = 128
_INT32 = 1 << 30  # with room for what lies behind the last neuron


def unsupported_reason(x_seq: Tensor, surrogate: Surrogate) -> str | None:
    """See :class:`sj_robust.ops.bn_dlif.stage.Kernels`."""
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
    vectors = _has_vectors(
        planes
    )  # without them half precision has no wider accesses to gain from more neurons
    make = dlif.forward_plan if kernel == "bn_dlif_forward" else dlif.backward_plan
    plan = make(dtype if vectors else torch.float32, steps, config)
    positions = plan.BLOCK
    if kernel == "bn_dlif_backward":
        if (
            plan.LATER
        ):  # then the sums over a channel are kept in registers from one segment to the next
            positions //= 2 if vectors else 4  # and addresses, without vectors one for every neuron
        if planes.pool:  # forward a thread has whole windows, to add them up
            positions //= 4 if _is_last(planes) else 2
    layout = Layout.of(planes, dtype, positions)
    return layout, {**asdict(plan), **asdict(layout)}


def moments(
    x_seq: Tensor, config: DLIFConfig, planes: Planes, norm: tuple[Tensor | None, ...], eps: float
) -> Tensor:
    """See :class:`sj_robust.ops.bn_dlif.stage.Kernels`."""
    steps = x_seq[:1] if is_repeated(x_seq) else x_seq
    weight, bias, running_mean, running_var = (None if a is None else a.contiguous() for a in norm)
    found = x_seq.new_empty((4, planes.channels), dtype=torch.float64)
    sums = None if running_mean is not None else _sums(steps, config, planes)
    tensors = (steps, sums, weight, bias, running_mean, running_var, found)
    sizes = (steps.numel() // planes.channels, planes.channels, planes.height * planes.width)
    _for_each_channel(
        "bn_moments", planes.channels, (*tensors, *sizes), {"EPS": eps, "LAST": _is_last(planes)}
    )
    return found


def forward(
    x_seq: Tensor, config: DLIFConfig, planes: Planes, moments: Tensor | None, tensors: Tensors
) -> None:
    """See :class:`sj_robust.ops.bn_dlif.stage.Kernels`."""
    layout, constants = cut("bn_dlif_forward", x_seq.dtype, len(x_seq), config, planes)
    given = (
        x_seq,
        moments,
        *(tensors.get(name) for name in ("gain", "v_init", "s", "v", "v_seq", "current")),
    )
    sizes = _sizes(x_seq, planes, layout)
    dlif.launch(
        _kernels().bn_dlif_forward,
        _programs(x_seq.shape[1], planes, layout),
        (*given, *sizes, *_rows(x_seq, planes), *dlif.scalars(config)),
        constants,
        warps=dlif.FORWARD_WARPS,
    )


def backward(
    x_seq: Tensor,
    config: DLIFConfig,
    planes: Planes,
    moments: Tensor | None,
    slopes: Tensor | None,
    tensors: Tensors,
) -> None:
    """See :class:`sj_robust.ops.bn_dlif.stage.Kernels`."""
    T, N = x_seq.shape[:2]
    layout, constants = cut("bn_dlif_backward", x_seq.dtype, T, config, planes)
    new = functools.partial(torch.empty, dtype=torch.float32, device=x_seq.device)
    sums, grad_gain = tensors.get("channel_sums"), tensors.get("gain_grad")
    programs = _programs(N, planes, layout)
    blocks = layout.blocks(N, planes)
    partial_sums = None if sums is None else new((blocks, 2, planes.channels))
    partial_grad_gain = None if grad_gain is None else new((programs, T))
    later = constants["LATER"]
    checkpoints = new((later, x_seq[0].numel())) if later else None
    given = (
        tensors.get(name)
        for name in ("gain", "v_init", "gs", "gv", "gvs", "g_current", "gx", "g_total", "gv_init")
    )
    x_row, *rows = _rows(x_seq, planes)
    arguments = (
        x_seq,
        moments,
        slopes,
        *given,
        partial_sums,
        partial_grad_gain,
        checkpoints,
        *_sizes(x_seq, planes, layout),
        x_row,
        x_row,
        *rows,
        *dlif.scalars(config),
        float(config.surrogate.alpha),
    )
    dlif.launch(
        _kernels().bn_dlif_backward, programs, arguments, constants, warps=dlif.BACKWARD_WARPS
    )
    for partial, total in ((partial_sums, sums), (partial_grad_gain, grad_gain)):
        if partial is not None and total is not None:
            total.copy_(partial.sum(0, dtype=torch.float64))


def finish(
    sums: Tensor, moments: Tensor, eps: float, count: int | None
) -> tuple[Tensor, Tensor | None]:
    """See :class:`sj_robust.ops.bn_dlif.stage.Kernels`."""
    grad_norm, slopes = torch.empty_like(sums), None if count is None else torch.empty_like(sums)
    channels = sums.shape[1]
    arguments = (sums, moments, grad_norm, slopes, count or 1, channels)
    _for_each_channel("bn_finish", channels, arguments, {"EPS": eps})
    return grad_norm, slopes


def _sums(steps: Tensor, config: DLIFConfig, planes: Planes) -> Tensor:
    """Over a channel, of the distance to its first number and of the square of that [2, C], in
    float64.
    """
    samples = steps.shape[0] * steps.shape[1]
    layout, constants = cut("bn_statistics", steps.dtype, 1, config, planes)
    blocks, of_channels = layout.blocks(samples, planes), -(-planes.channels // layout.CHANNELS)
    count = min(
        _MOST_TILES, _power_above(1 + blocks * of_channels // _PROGRAMS)
    )  # few kernels to compile
    programs = -(-blocks // count)
    partial = torch.empty((programs, 2, planes.channels), dtype=torch.float32, device=steps.device)
    units = planes.height * planes.width // layout.UNIT
    arguments = (steps, partial, samples, planes.channels, units)
    constants["COUNT"] = count
    dlif.launch(
        _kernels().bn_statistics,
        programs * of_channels,
        arguments,
        constants,
        warps=dlif.FORWARD_WARPS,
    )
    return partial.sum(0, dtype=torch.float64)


def _for_each_channel(
    name: str, channels: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    constants["BLOCK"] = _CHANNELS_AT_ONCE
    programs = -(-channels // _CHANNELS_AT_ONCE)
    dlif.launch(getattr(_kernels(), name), programs, arguments, constants, warps=4)


def _programs(samples: int, planes: Planes, layout: Layout) -> int:
    return layout.blocks(samples, planes) * -(-planes.channels // layout.CHANNELS)


def _sizes(x_seq: Tensor, planes: Planes, layout: Layout) -> tuple[int, int, int, int]:
    """Samples, channels, height and width in units; without pooling a plane is one line."""
    height, width = (
        (planes.height, planes.width) if planes.pool else (1, planes.height * planes.width)
    )
    return x_seq.shape[1], planes.channels, height, width // layout.UNIT


def _rows(x_seq: Tensor, planes: Planes) -> tuple[int, int, int]:
    """Strides of time: of x, of what has its shape, of the means."""
    neurons = x_seq[0].numel()
    means = x_seq.shape[1] * planes.channels * (planes.height // 2) * (planes.width // 2)
    return 0 if is_repeated(x_seq) else neurons, neurons, means if planes.pool else neurons


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
