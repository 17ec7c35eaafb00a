"""Batch norm, DLIF and 2x2 average pooling in one pass: what calls the kernels, whichever they are.

Forward reads the input twice in training (statistics, then the pass itself) and once otherwise;
neither the normalised tensor nor, with pooling, the spikes ever exist. Only the input and a few
numbers per channel are saved for backward. As with DLIF alone there is a node for tensors with
memory and ``torch.ops.sj_robust.bn_dlif`` for the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif import cpp, triton_launch
from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.bn_dlif.repeated import repeated_step
from sj_robust.ops.dlif import autograd
from sj_robust.ops.dlif.autograd import is_plain, or_empty
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, Planes, Tensors, is_repeated, state_dtype
from sj_robust.ops.surrogate import Surrogate

__all__ = ["KERNELS", "Kernels", "multi_step", "unsupported_reason"]


class Kernels(Protocol):
    """What a backend provides, for sequences that lie as :class:`Planes` says; steps may all be the
    same one.

    Moments are mean, variance, scale and offset per channel, [4, C] in float64, or None without
    batch norm.
    """

    def unsupported_reason(self, x_seq: Tensor, surrogate: Surrogate) -> str | None:
        """Why this call cannot run here, or None."""

    def moments(
        self,
        x_seq: Tensor,
        config: DLIFConfig,
        planes: Planes,
        norm: tuple[Tensor | None, ...],
        eps: float,
    ) -> Tensor:
        """From weight, bias, running mean and variance, each [C] or None; without the last two from
        the batch.
        """

    def forward(
        self,
        x_seq: Tensor,
        config: DLIFConfig,
        planes: Planes,
        moments: Tensor | None,
        tensors: Tensors,
    ) -> None:
        """Read ``gain`` and ``v_init``, fill ``s`` and ``v`` and, where they are there, ``v_seq``
        and ``current``.
        """

    def backward(
        self,
        x_seq: Tensor,
        config: DLIFConfig,
        planes: Planes,
        moments: Tensor | None,
        slopes: Tensor | None,
        tensors: Tensors,
    ) -> None:
        """Read gradients of the outputs ``gs``, ``gv``, ``gvs``, ``g_current``, fill those of the
        inputs.

        With g the gradient of a current: ``gx``, ``g * scale`` plus, where slopes [2, C] are given,
        ``(x - mean) * slopes[0] + slopes[1]``; ``g_total``, the sum of ``g * scale`` over time;
        ``channel_sums`` [2, C], those of g and g (x - mean); ``gain_grad`` and ``gv_init``.
        """

    def finish(
        self, sums: Tensor, moments: Tensor, eps: float, count: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and bias [2, C], and for statistics of a batch of ``count`` values
        the slopes [2, C].
        """


KERNELS: dict[str, Kernels] = {"cpp": cpp, "triton": triton_launch}
"""Backends that run a call in one pass."""


def unsupported_reason(
    backend: str,
    x_seq: Tensor,
    norm: BatchNorm | None,
    surrogate: Surrogate,
    average_pool: bool = False,
) -> str | None:
    """Why this call cannot run in one pass of a backend, or None."""
    if x_seq.numel() == 0:
        return "x_seq is empty"
    reason = KERNELS[backend].unsupported_reason(x_seq, surrogate)
    if reason is not None:
        return reason
    if autograd.differentiates_by_functorch():
        return "torch.func.grad and its like differentiate plain torch alone"
    if _memory_format(x_seq) is None:
        return "one pass needs time steps that are contiguous or channels last, without gaps"
    if average_pool and (x_seq.ndim != 5 or min(x_seq.shape[3:]) < 2):
        return (
            "pooling needs x_seq [T, N, C, H, W] with planes of 2x2 or more, got "
            f"{tuple(x_seq.shape)}"
        )
    for tensor in (
        () if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    ):
        dtypes = (x_seq.dtype, state_dtype(x_seq))
        if tensor is not None and (tensor.dtype not in dtypes or tensor.device != x_seq.device):
            return (
                f"the batch norm is {tensor.dtype} on {tensor.device}, x_seq {x_seq.dtype} on "
                f"{x_seq.device}"
            )
    return None


def multi_step(
    backend: str,
    inputs: Inputs,
    norm: BatchNorm | None,
    average_pool: bool,
    store_v_seq: bool,
    store_current: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Spikes or their means, last potential and, if asked for, all potentials and the neurons'
    currents.

    The currents [T, N, C, *], those behind the batch norm, are in the dtype of the potentials.
    """
    x_seq, input_gain, v_init, config = inputs
    layout = _memory_format(x_seq)
    assert layout is not None  # see unsupported_reason
    values = x_seq.numel() // x_seq.shape[2]
    if norm is not None and (step := repeated_step(x_seq)) is not None:
        x_seq = step  # whose gradient is the sum over time
    elif not is_repeated(x_seq):  # as a first layer's current, which is computed once
        x_seq = _dense(x_seq, layout)
    v_init = None if v_init is None else v_init.contiguous(memory_format=layout)
    weight = bias = running_mean = running_var = statistics = None
    eps = 0.0
    if norm is not None:
        weight, bias, eps = norm.weight, norm.bias, norm.eps
        statistics = "batch" if norm.use_batch_statistics else "running"
        if not norm.use_batch_statistics:
            running_mean, running_var = norm.running_mean, norm.running_var
    stage = _Stage(config, statistics, eps, average_pool, layout == torch.channels_last, backend)
    tensors = (x_seq, weight, bias, input_gain, v_init, running_mean, running_var)
    if is_plain(*tensors):
        # torch's apply
        outputs = _StageFunction.apply(  # type: ignore[no-untyped-call]
            *tensors, stage, store_v_seq, store_current
        )
    else:
        outputs = _bn_dlif(*tensors, *stage.arguments, store_v_seq, store_current)
    spike_seq, v, v_seq, current, moments = outputs
    if norm is not None and norm.use_batch_statistics:
        _update(norm, moments, values)
    return spike_seq, v, v_seq if store_v_seq else None, current if store_current else None


@dataclass(frozen=True)
class _Stage:
    """Constants of a call: ``statistics`` are those of the ``batch``, ``running`` ones, or None
    without batch norm.
    """

    config: DLIFConfig
    statistics: str | None
    eps: float
    average_pool: bool
    channels_last: bool
    backend: str

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As a registered operator takes them."""
        constants = self.config.arguments
        return (
            *constants,
            self.statistics,
            self.eps,
            self.average_pool,
            self.channels_last,
            self.backend,
        )

    @classmethod
    def of(cls, *arguments: Any) -> "_Stage":
        """The inverse of :attr:`arguments`."""
        return cls(DLIFConfig.of(*arguments[:6]), *arguments[6:])

    def planes(self, x_seq: Tensor) -> Planes:
        height, width = x_seq.shape[3:] if x_seq.ndim == 5 else (x_seq.shape[3:].numel(), 1)
        return Planes(x_seq.shape[2], height, width, self.channels_last, self.average_pool)

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def room(
        self, x_seq: Tensor, T: int | None, dtype: torch.dtype, *, pooled: bool = False
    ) -> Tensor:
        """T steps of the shape of those of ``x_seq``, or of the means of their 2x2 neurons; for
        None one without T.
        """
        N, C, *plane = x_seq.shape[1:]
        plane = [size // 2 for size in plane] if pooled else plane
        count = N if T is None else T * N
        room = torch.empty(
            count, C, *plane, dtype=dtype, device=x_seq.device, memory_format=self.layout
        )
        return room if T is None else room.view(T, N, C, *plane)


def _outputs(
    x_seq: Tensor, T: int, stage: _Stage, store_v_seq: bool, store_current: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Room for spikes or their means, last potential, potentials and currents."""
    dtype = state_dtype(x_seq)
    return (
        stage.room(x_seq, T, x_seq.dtype, pooled=stage.average_pool),
        stage.room(x_seq, None, dtype),
        stage.room(x_seq, T, dtype) if store_v_seq else None,
        stage.room(x_seq, T, dtype) if store_current else None,
    )


def _forward(
    step: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    input_gain: Tensor,
    v_init: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stage: _Stage,
    store_v_seq: bool,
    store_current: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The outputs; and mean, variance, scale and offset per channel [4, C] in float64."""
    T = len(input_gain)
    x_seq, planes = _over_time(step, T), stage.planes(step)
    spike_seq, v, v_seq, current = _outputs(step, T, stage, store_v_seq, store_current)
    tensors = {
        "gain": input_gain,
        "v_init": v_init,
        "s": spike_seq,
        "v": v,
        "v_seq": v_seq,
        "current": current,
    }
    kernels, config, moments = KERNELS[stage.backend], stage.config, None
    if stage.statistics is not None:
        moments = kernels.moments(
            x_seq, config, planes, (weight, bias, running_mean, running_var), stage.eps
        )
    kernels.forward(x_seq, config, planes, moments, tensors)
    return spike_seq, v, v_seq, current, moments


def _backward(
    grads: tuple[Tensor | None, ...],
    step: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None,
    moments: Tensor | None,
    stage: _Stage,
    needs_x: bool,
    needs_v_init: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Gradients of x, of weight and bias together [2, C] in float64, of the gain and of the first
    potential.
    """
    T, config, planes = len(input_gain), stage.config, stage.planes(step)
    x_seq = _over_time(step, T)
    gs, gv, gvs, g_current = grads
    if gs is None:
        gs = stage.room(step, T, step.dtype, pooled=stage.average_pool).zero_()
    grad_x, grad_gain, grad_v_init = _gradients(step, input_gain, stage, needs_x, needs_v_init)
    tensors: Tensors = {
        "gain": input_gain,
        "v_init": v_init,
        "gs": _dense(gs, stage.layout),
        "gv": None if gv is None else gv.contiguous(memory_format=stage.layout),
        "gvs": None if gvs is None else _dense(gvs, stage.layout),
        "g_current": None if g_current is None else _dense(g_current, stage.layout),
        "gain_grad": grad_gain,
        "gv_init": grad_v_init,
    }
    kernels, batch = KERNELS[stage.backend], stage.statistics == "batch"
    once = (
        moments is not None and len(step) < T
    )  # then the gradient is the sum over time, in the dtype of potentials
    if moments is None:
        kernels.backward(x_seq, config, planes, None, None, {**tensors, "gx": grad_x})
        return grad_x, None, grad_gain, grad_v_init
    total = grad_x if once else None
    if total is not None and total.dtype != state_dtype(step):
        total = stage.room(step, 1, state_dtype(step))
    sums = moments.new_empty(2, planes.channels)
    # mean and variance of a batch depend on x, so its gradient needs the sums first
    grad_x_now = None if batch or once else grad_x
    tensors |= {"gx": grad_x_now, "g_total": total, "channel_sums": sums}
    kernels.backward(x_seq, config, planes, moments, None, tensors)
    count = x_seq.numel() // planes.channels if batch else None
    grad_norm, slopes = kernels.finish(sums, moments, stage.eps, count)
    if slopes is not None and grad_x is not None and not once:
        done = dict.fromkeys(("channel_sums", "gain_grad", "gv_init"))
        kernels.backward(x_seq, config, planes, moments, slopes, {**tensors, "gx": grad_x, **done})
    if slopes is not None and total is not None:  # their share is the same at every step
        mean, (slope, constant) = moments[0].to(total.dtype), slopes.to(total.dtype)
        slope, constant = (
            T * a.view(-1, *[1] * (step.ndim - 3)) for a in (slope, constant - slope * mean)
        )
        total.addcmul_(step, slope).add_(constant)
    grad_x = grad_x if total is None else total.to(step.dtype)
    return grad_x, grad_norm, grad_gain, grad_v_init


def _gradients(
    step: Tensor, input_gain: Tensor, stage: _Stage, needs_x: bool, needs_v_init: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Room for the gradients of x, gain and first potential."""
    return (
        stage.room(step, len(step), step.dtype) if needs_x or stage.statistics is None else None,
        torch.empty_like(input_gain),
        stage.room(step, None, state_dtype(step)) if needs_v_init else None,
    )


def _set_up(ctx: Any, inputs: tuple[Any, ...], moments: Tensor | None, stage: _Stage) -> None:
    step, weight, bias, input_gain, v_init, *_ = inputs
    ctx.save_for_backward(step, input_gain, v_init, moments)
    ctx.stage, ctx.dtypes = stage, [None if t is None else t.dtype for t in (weight, bias)]
    ctx.set_materialize_grads(False)
    if moments is not None:
        ctx.mark_non_differentiable(moments)


def _differentiate(
    ctx: Any, run: Callable[..., Any], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    needs_x, *needs_norm, _, needs_v_init = ctx.needs_input_grad[:5]
    step, input_gain, v_init, moments = autograd.saved_tensors(ctx)
    grad_x, grad_norm, grad_gain, grad_v_init = run(
        grads, step, input_gain, v_init, moments, ctx.stage, needs_x, needs_v_init
    )
    of_norm = (
        grad_norm[i].to(ctx.dtypes[i]) if needed else None for i, needed in enumerate(needs_norm)
    )
    return grad_x, *of_norm, grad_gain, grad_v_init


class _StageFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        outputs = _forward(*arguments)
        _set_up(ctx, arguments, outputs[-1], arguments[7])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run = _backward if is_plain(*grads) else _registered_backward
        return *_differentiate(ctx, run, grads[:4]), *[None] * 5


# The registration, as in sj_robust.ops.dlif.autograd.


def _forward_kernel(step: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    (
        weight,
        bias,
        gain,
        v_init,
        running_mean,
        running_var,
        *constants,
        store_v_seq,
        store_current,
    ) = arguments
    stage = _Stage.of(*constants)
    step, gain, v_init = _ordered(step, gain, v_init, stage)
    running = (running_mean, running_var)
    outputs = _forward(
        step, weight, bias, gain, v_init, *running, stage, store_v_seq, store_current
    )
    return tuple(or_empty(output, step) for output in outputs)


def _ordered(
    step: Tensor, input_gain: Tensor, v_init: Tensor | None, stage: _Stage
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As they must lie in memory, which a graph need not keep."""
    autograd.check_graph(stage.backend, stage.config, step, input_gain, v_init)
    in_order = is_repeated(step) and step[0].is_contiguous(memory_format=stage.layout)
    step = step if in_order else _dense(step, stage.layout)
    v_init = None if v_init is None else v_init.contiguous(memory_format=stage.layout)
    return step, input_gain.contiguous(), v_init


def _forward_fake(step: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, input_gain, _, _, _, *constants, store_v_seq, store_current = arguments
    stage = _Stage.of(*constants)
    outputs = _outputs(step, input_gain.shape[0], stage, store_v_seq, store_current)
    moments = (
        None if stage.statistics is None else step.new_empty(4, step.shape[2], dtype=torch.float64)
    )
    return tuple(or_empty(output, step) for output in (*outputs, moments))


def _backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    grads, (step, gain, v_init, moments), rest = arguments[:4], arguments[4:8], arguments[8:]
    *constants, needs_x, needs_v_init = rest
    stage = _Stage.of(*constants)
    step, gain, v_init = _ordered(step, gain, v_init, stage)
    found = _backward(grads, step, gain, v_init, moments, stage, needs_x, needs_v_init)
    return tuple(or_empty(gradient, step) for gradient in found)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    step, input_gain, _, moments = arguments[4:8]
    *constants, needs_x, needs_v_init = arguments[8:]
    grad_x, *rest = _gradients(step, input_gain, _Stage.of(*constants), needs_x, needs_v_init)
    grad_norm = None if moments is None else moments.new_empty(2, step.shape[2])
    return tuple(or_empty(gradient, step) for gradient in (grad_x, grad_norm, *rest))


def _registered_backward(
    grads: tuple[Tensor | None, ...], *arguments: Any
) -> tuple[Tensor | None, ...]:
    *tensors, stage, needs_x, needs_v_init = arguments
    grad_x, grad_norm, grad_gain, grad_v_init = _bn_dlif_backward(
        *grads, *tensors, *stage.arguments, needs_x, needs_v_init
    )
    return grad_x if needs_x else None, grad_norm, grad_gain, grad_v_init if needs_v_init else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *constants, store_v_seq, store_current = inputs[7:]
    stage = _Stage.of(*constants)
    _set_up(ctx, inputs, None if stage.statistics is None else output[4], stage)
    ctx.stored = (True, True, store_v_seq, store_current)


def _registered_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = tuple(grad if stored else None for grad, stored in zip(grads, ctx.stored, strict=False))
    return *_differentiate(ctx, _registered_backward, grads), *[None] * 15


_CONSTANTS = (
    f"{autograd.CONSTANTS}, str? statistics, float eps, bool average_pool, bool channels_last, "
    "str backend"
)
_bn_dlif = autograd.define(
    "bn_dlif",
    "(Tensor x_seq, Tensor? weight, Tensor? bias, Tensor input_gain, Tensor? v_init, Tensor? "
    f"running_mean, Tensor? running_var, {_CONSTANTS}, bool store_v_seq, bool store_current) -> "
    "(Tensor spike_seq, Tensor v, Tensor v_seq, Tensor current, Tensor moments)",
    kernel=_forward_kernel,
    fake=_forward_fake,
)
_bn_dlif_backward = autograd.define(
    "bn_dlif_backward",
    "(Tensor? grad_spike_seq, Tensor? grad_v, Tensor? grad_v_seq, Tensor? grad_current, Tensor "
    f"x_seq, Tensor input_gain, Tensor? v_init, Tensor? moments, {_CONSTANTS}, bool needs_x, "
    "bool needs_v_init) -> (Tensor grad_x, Tensor grad_norm, Tensor grad_input_gain, Tensor "
    "grad_v_init)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
autograd.define_gradient("bn_dlif", _registered_gradient, _setup_context)


def _memory_format(x_seq: Tensor) -> torch.memory_format | None:
    """The order in which every step lies in memory without gaps, if it is one that the kernel
    knows.
    """
    for layout in (
        (torch.contiguous_format, torch.channels_last)
        if x_seq.ndim == 5
        else (torch.contiguous_format,)
    ):
        if x_seq[0].is_contiguous(memory_format=layout):
            return layout
    return None


def _dense(x_seq: Tensor, layout: torch.memory_format) -> Tensor:
    """The sequence without gaps, every step in this order; the same tensor where it is that
    already.
    """
    if layout == torch.contiguous_format:
        return x_seq.contiguous()
    return x_seq.flatten(0, 1).contiguous(memory_format=layout).view(x_seq.shape)


def _over_time(x_seq: Tensor, T: int) -> Tensor:
    """The sequence itself, or its one step repeated without a copy."""
    return x_seq if len(x_seq) == T else x_seq.expand(T, *x_seq.shape[1:])


def _update(norm: BatchNorm, moments: Tensor, values: int) -> None:
    """Running statistics, from those of a batch with so many values per channel."""
    # Through .data, since torch's own batch norm leaves their version alone too: the graph of an
    # earlier pass, which names them without using them, stays good.
    for running, value in (
        (norm.running_mean, moments[0]),
        (norm.running_var, moments[1] * (values / (values - 1))),
    ):
        if running is not None:
            running.data.copy_((1 - norm.momentum) * running.double() + norm.momentum * value)
