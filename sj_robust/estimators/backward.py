"""Backward passes of gradient estimators: through time, or by the firing rate.

The values of the run are computed already; only its gradient is replaced.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sj_robust.core.broadcast import along
from sj_robust.estimators.dynamics import Sequence
from sj_robust.estimators.shapes import refuse_second_derivative

__all__ = ["Outputs", "bptr", "hart", "hart_mixed", "rga", "through_time"]

Slopes = Callable[[Tensor], Tensor]
_RGA_SLOPE_BELOW = 0.2
"""Slope of the rate where the mean input is too weak to reach the threshold."""


class Outputs(NamedTuple):
    """Outputs of a neuron: the values of its run, with the gradient of an estimator."""

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
        factors = _Factors(slope=slope, keep=keep, before=before)
    # torch leaves apply untyped
    spike_seq, v, v_seq = _ThroughTime.apply(  # type: ignore[no-untyped-call]
        run.x_seq,
        _tensor_or_none(run.v_init),
        _tensor_or_none(run.charging.gain),
        _tensor_or_none(run.charging.decay),
        run,
        factors,
    )
    return Outputs(spike_seq, v, v_seq)


class _Factors(NamedTuple):
    """Derivatives within a run, for back-propagation through time.

    Attributes:
        slope: Derivative of the spike with respect to the charged potential h, [T, N, *].
        keep: Derivative of the potential after the reset with respect to h, [T, N, *]; [T] if it is
            1 everywhere.
        before: Potential before each step, [T, N, *]; None unless the decay needs a gradient.
    """

    slope: Tensor
    keep: Tensor
    before: Tensor | None


def _tensor_or_none(value: Tensor | float) -> Tensor | None:
    """The value if it is a tensor, which may need a gradient; None for a number."""
    return value if isinstance(value, Tensor) else None


def bptr(run: Sequence) -> Outputs:
    """BPTR: ``grad_x[t] = grad_s[t]`` for neurons that spike within the sequence, 0 for all
    others.
    """
    with torch.no_grad():
        rate = run.spike_seq.mean(0, keepdim=True)
        gate = (rate > 0).to(run.dtype)
    return _gated(run, gate, average=False)


def rga(run: Sequence) -> Outputs:
    """RGA: ``grad_x[t] = grad_s[t] * r'(u) * gain / theta`` with u the mean input over time.

    Equation: ``theta = v_threshold - v_reset``, ``u = mean_t(gain[t] * x[t]) / theta`` and, with
    gamma = 0.2, ``r'(u) = gamma`` for ``0 <= u < 1 - decay``, ``(1 - gamma + gamma * decay) / (1 +
    decay)`` for ``1 - decay <= u <= 2``, else 0.
    """
    theta = run.v_threshold - (run.v_reset or 0.0)
    decay = run.charging.decay_value
    gamma = _RGA_SLOPE_BELOW
    with torch.no_grad():
        scale = run.per_step(run.charging.gain)
        scaled = run.x_seq.detach().to(run.dtype) * scale
        u = scaled.mean(0, keepdim=True) / theta
        above = (1 - gamma + gamma * decay) / (1 + decay)
        inside = (u >= 0) & (u <= 2)
        slope = torch.where(u < 1 - decay, gamma, above) * inside
        gate = slope * (scale / theta)
    return _gated(run, gate.to(run.dtype), average=False)


def hart(run: Sequence, slopes: Slopes) -> Outputs:
    """HART: ``grad_x[t] = gain[t] * slopes(z)[t] * mean_t grad_s[t]``, the previous potential
    detached.
    """
    with torch.no_grad():
        h_seq, _ = run.charged
        slope = slopes(h_seq - run.v_threshold)
        gate = slope * run.per_step(run.charging.gain)
    return _gated(run, gate, average=True)


def hart_mixed(run: Sequence, slopes: Slopes, own_slopes: Slopes) -> Outputs:
    """Mean of :func:`hart` and of back-propagation through time with the neuron's own surrogate."""
    own = through_time(run, own_slopes)
    other = hart(run, slopes)
    # Both have the same spikes, so that the mean has exactly these spikes, and the mean gradient.
    mean = 0.5 * own.spike_seq + 0.5 * other.spike_seq
    return own._replace(spike_seq=mean)


def _keep(run: Sequence, h_seq: Tensor, slope: Tensor) -> Tensor:
    """``keep`` of :class:`_Factors`; see :func:`through_time` for the equation."""
    if run.v_reset is None:
        if run.detach_reset:
            return h_seq.new_ones(len(h_seq))
        return 1 - slope * run.v_threshold
    keep = 1 - run.spike_seq.to(run.dtype)
    if run.detach_reset:
        return keep
    above_reset = h_seq - run.v_reset if run.v_reset else h_seq
    return keep.addcmul_(above_reset, slope, value=-1)


class _ThroughTime(torch.autograd.Function):
    """Hands out the outputs of a run; backward is the recursion of :func:`through_time`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        v_init: Tensor | None,
        gain: Tensor | None,
        decay: Tensor | None,
        run: Sequence,
        factors: _Factors,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(x_seq, gain, factors.slope, factors.keep, factors.before)
        ctx.decay = run.charging.decay_value
        ctx.gain = run.charging.gain if gain is None else None
        ctx.dtype = run.dtype
        ctx.rest = run.v_reset or 0.0
        ctx.x_dtype = x_seq.dtype
        ctx.v_dtype = None if v_init is None else v_init.dtype
        ctx.decay_dtype = None if decay is None else decay.dtype
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
        needs_x, needs_v, needs_gain, needs_decay, *_ = ctx.needs_input_grad
        grad_x_seq = grad_v_init = grad_gain = grad_decay = None
        if needs_v:
            grad_v_init = (grad_h[0] * ctx.decay).to(ctx.v_dtype)
        if needs_gain:
            product = grad_h * x_seq
            per_step = gain.ndim > 0  # else one gain for all steps
            summed = product.flatten(1).sum(1) if per_step else product.sum()
            grad_gain = summed.to(gain.dtype)
        if needs_decay:
            summed = ((before - ctx.rest) * grad_h).sum()
            grad_decay = summed.to(ctx.decay_dtype)
        if needs_x:  # last, since it changes grad_h in place
            scaled = _times_gain(grad_h, ctx.gain if gain is None else gain)
            grad_x_seq = scaled.to(ctx.x_dtype)
        return grad_x_seq, grad_v_init, grad_gain, grad_decay, None, None


def _times_gain(grad_h: Tensor, gain: float | Tensor) -> Tensor:
    """``gain * grad_h``, in place."""
    if isinstance(gain, Tensor):
        return grad_h.mul_(along(gain.to(grad_h.dtype), 0, grad_h.ndim))
    return grad_h if gain == 1.0 else grad_h.mul_(gain)


def _gated(run: Sequence, gate: Tensor, *, average: bool) -> Outputs:
    """Outputs with ``grad_x = gate * grad_s``, or ``gate * mean_t grad_s`` if ``average``; the
    potentials have no gradient.
    """
    # torch leaves apply untyped
    spike_seq: Tensor = _Gated.apply(  # type: ignore[no-untyped-call]
        run.x_seq, run.spike_seq, gate, average
    )
    return Outputs(spike_seq, run.v, run.v_seq)


class _Gated(torch.autograd.Function):
    """Hands out the spikes of a run; backward is the equation of :func:`_gated`."""

    @staticmethod
    def forward(ctx: Any, x_seq: Tensor, spike_seq: Tensor, gate: Tensor, average: bool) -> Tensor:
        ctx.save_for_backward(gate)
        ctx.average = average
        ctx.dtype = x_seq.dtype
        return spike_seq.view_as(spike_seq)

    @staticmethod
    def backward(ctx: Any, grad_spike_seq: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative()
        (gate,) = ctx.saved_tensors
        if ctx.average:
            grad_spike_seq = grad_spike_seq.mean(0, keepdim=True, dtype=gate.dtype)
        grad_x_seq = gate * grad_spike_seq
        return grad_x_seq.to(ctx.dtype), None, None, None
