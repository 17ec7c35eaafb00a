"""Backward passes for a run of a neuron whose values are settled: through time, or by its rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sj_robust.estimators.dynamics import Sequence
from sj_robust.estimators.shapes import refuse_second_derivative

__all__ = ["Outputs", "bptr", "hart", "hart_mixed", "rga", "through_time"]

Slopes = Callable[[Tensor], Tensor]
_RGA_SLOPE_BELOW = 0.2  # slope of the rate where the mean input is too weak to reach the threshold


class Outputs(NamedTuple):
    """What a neuron leaves behind: the values of the run, with the gradient of an estimator."""

    spike_seq: Tensor
    v: Tensor
    v_seq: Tensor | None


def through_time(run: Sequence, slopes: Slopes) -> Outputs:
    """Back-propagation through time with ``slopes(z)`` for the derivative of the spike, z [T, N,
    *].

    Equation, with g = slopes(h - v_threshold) and t running back::

        keep[t]   = (1 - s[t]) + g[t] * (v_reset - h[t])       hard reset
        keep[t]   = 1 - g[t] * v_threshold                     soft reset
        grad_h[t] = grad_s[t] * g[t] + keep[t] * (decay * grad_h[t+1] + grad_v[t])
        grad_x[t] = gain[t] * grad_h[t]

    A detached reset leaves out the terms of keep in g.
    """
    with torch.no_grad():
        h_seq, before = run.charged
        slope = slopes(h_seq - run.v_threshold)
        keep = _keep(run, h_seq, slope)
    learned = (
        value if isinstance(value, Tensor) else None
        for value in (run.charging.gain, run.charging.decay)
    )
    v_init = run.v_init if isinstance(run.v_init, Tensor) else None
    # torch leaves apply untyped
    outputs = _ThroughTime.apply(  # type: ignore[no-untyped-call]
        run.x_seq, v_init, *learned, run, slope, keep, before
    )
    return Outputs(*outputs)


def bptr(run: Sequence) -> Outputs:
    """BPTR: ``grad_x[t] = grad_s[t]`` for neurons that spike within the sequence, 0 for all
    others.
    """
    with torch.no_grad():
        gate = (run.spike_seq.mean(0, keepdim=True) > 0).to(run.dtype)
    return _gated(run, gate, average=False)


def rga(run: Sequence) -> Outputs:
    """RGA: ``grad_x[t] = grad_s[t] * r'(u) * gain / theta`` with u the mean input over time.

    Equation: ``theta = v_threshold - v_reset``, ``u = mean_t(gain[t] * x[t]) / theta`` and, with
    gamma = 0.2, ``r'(u) = gamma`` for ``0 <= u < 1 - decay``, ``(1 - gamma + gamma * decay) / (1 +
    decay)`` for ``1 - decay <= u <= 2``, else 0.
    """
    theta = run.v_threshold - (run.v_reset or 0.0)
    decay, gamma = run.charging.decay_value, _RGA_SLOPE_BELOW
    with torch.no_grad():
        scale = run.per_step(run.charging.gain)
        u = (run.x_seq.detach().to(run.dtype) * scale).mean(0, keepdim=True) / theta
        above = (1 - gamma + gamma * decay) / (1 + decay)
        slope = torch.where(u < 1 - decay, gamma, above) * ((u >= 0) & (u <= 2))
        gate = slope * (scale / theta)
    return _gated(run, gate.to(run.dtype), average=False)


def hart(run: Sequence, slopes: Slopes) -> Outputs:
    """HART: ``grad_x[t] = gain[t] * slopes(z)[t] * mean_t grad_s[t]``, the previous potential
    detached.
    """
    with torch.no_grad():
        h_seq, _ = run.charged
        gate = slopes(h_seq - run.v_threshold) * run.per_step(run.charging.gain)
    return _gated(run, gate, average=True)


def hart_mixed(run: Sequence, slopes: Slopes, own_slopes: Slopes) -> Outputs:
    """Mean of :func:`hart` and of back-propagation through time with the neuron's own surrogate."""
    own, spike_seq = through_time(run, own_slopes), hart(run, slopes).spike_seq
    return own._replace(
        spike_seq=0.5 * own.spike_seq + 0.5 * spike_seq
    )  # equal values, so their mean is exact


def _keep(run: Sequence, h_seq: Tensor, slope: Tensor) -> Tensor:
    """Derivative of the potential after the reset in the one before it, [T, N, *] or, if all are 1,
    [T].
    """
    if run.v_reset is None:
        if run.detach_reset:
            return h_seq.new_ones(len(h_seq))
        return 1 - slope * run.v_threshold
    keep = 1 - run.spike_seq.to(run.dtype)
    if not run.detach_reset:
        keep = keep.addcmul_(h_seq - run.v_reset if run.v_reset else h_seq, slope, value=-1)
    return keep


class _ThroughTime(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        v_init: Tensor | None,
        gain: Tensor | None,
        decay: Tensor | None,
        run: Sequence,
        slope: Tensor,
        keep: Tensor,
        before: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(x_seq, gain, slope, keep, before)
        ctx.decay, ctx.gain = run.charging.decay_value, run.charging.gain if gain is None else None
        ctx.dtype, ctx.rest = run.dtype, run.v_reset or 0.0
        ctx.dtypes = tuple(
            None if value is None else value.dtype for value in (x_seq, v_init, gain, decay)
        )
        ctx.set_materialize_grads(False)
        return run.spike_seq, run.v, run.v_seq

    @staticmethod
    def backward(
        ctx: Any, grad_spike_seq: Tensor | None, grad_v: Tensor | None, grad_v_seq: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x_seq, gain, slope, keep, before = ctx.saved_tensors
        grad_h = torch.zeros_like(slope) if grad_spike_seq is None else slope * grad_spike_seq
        if grad_v is not None:
            grad_h[-1].addcmul_(grad_v.to(ctx.dtype), keep[-1])
        for t in reversed(range(len(grad_h))):
            if grad_v_seq is not None:
                grad_h[t].addcmul_(grad_v_seq[t].to(ctx.dtype), keep[t])
            if t + 1 < len(grad_h):
                grad_h[t].addcmul_(grad_h[t + 1], keep[t], value=ctx.decay)
        grad_v_init = grad_h[0] * ctx.decay if ctx.needs_input_grad[1] else None
        grad_gain = None
        if ctx.needs_input_grad[2]:
            product = grad_h * x_seq
            grad_gain = product.flatten(1).sum(1) if gain.ndim else product.sum()
        grad_decay = ((before - ctx.rest) * grad_h).sum() if ctx.needs_input_grad[3] else None
        grad_x_seq = (
            _times_gain(grad_h, ctx.gain if gain is None else gain)
            if ctx.needs_input_grad[0]
            else None
        )
        grads = (grad_x_seq, grad_v_init, grad_gain, grad_decay)
        return *(
            None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)
        ), *[None] * 4


def _times_gain(grad_h: Tensor, gain: float | Tensor) -> Tensor:
    """``gain * grad_h``, in place."""
    if isinstance(gain, Tensor):
        return grad_h.mul_(gain.to(grad_h.dtype).view(-1, *[1] * (grad_h.ndim - 1)))
    return grad_h if gain == 1.0 else grad_h.mul_(gain)


def _gated(run: Sequence, gate: Tensor, *, average: bool) -> Outputs:
    # torch's apply
    spike_seq: Tensor = _Gated.apply(  # type: ignore[no-untyped-call]
        run.x_seq, run.spike_seq, gate, average
    )
    return Outputs(spike_seq, run.v, run.v_seq)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_seq: Tensor, spike_seq: Tensor, gate: Tensor, average: bool) -> Tensor:
        ctx.save_for_backward(gate)
        ctx.average, ctx.dtype = average, x_seq.dtype
        return spike_seq.view_as(spike_seq)

    @staticmethod
    def backward(ctx: Any, grad_spike_seq: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative()
        (gate,) = ctx.saved_tensors
        if ctx.average:
            grad_spike_seq = grad_spike_seq.mean(0, keepdim=True, dtype=gate.dtype)
        return (gate * grad_spike_seq).to(ctx.dtype), None, None, None
