"""Perturbation of the membrane potential as pure functions of two runs of one layer."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sj_robust.core.checks import check_choice, check_number
from sj_robust.ops.dlif.config import state_dtype
from sj_robust.ops.recurrence import charge, fire, reset

__all__ = [
    "NORMS",
    "Norm",
    "full_perturbation",
    "membrane_potential",
    "ms_mppd",
    "simplified_perturbation",
    "spike_train_distance",
    "tasad",
]

Norm = Literal["l2", "l1"]
"""Mean square, or mean absolute value."""
NORMS = get_args(Norm)


def simplified_perturbation(
    x_seq: Tensor, x_seq_perturbed: Tensor, *, decay: float | Tensor, gain: float | Tensor = 1.0
) -> Tensor:
    """Perturbation of the membrane potential without the reset. 忽略复位的膜电位扰动。

    Equation, with ``eps[-1] = 0``::

        eps[t] = decay * eps[t-1] + gain[t] * (x[t] - x~[t])

    Differentiable in every tensor argument.

    Args:
        x_seq: Input currents [T, N, *] of the clean run.
        x_seq_perturbed: Input currents [T, N, *] of the perturbed run.
        decay: Fraction of the potential kept per step, in (0, 1]; 1 for IF, ``1 - 1 / tau`` for
            LIF.
        gain: Input gain, one number for all steps or a tensor [T] with one per step.

    Returns:
        ``eps`` [T, N, *], in float32 for half-precision currents.

    Raises:
        ValueError: If the shapes differ, there is no step, ``decay`` is outside (0, 1] or ``gain``
            is not [T].

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024), simplified
        perturbation dynamics.

    Examples:
        >>> x = torch.full((3, 1), 0.3)
        >>> simplified_perturbation(x, x - 0.1, decay=0.5).flatten()
        tensor([0.1000, 0.1500, 0.1750])
    """
    _check_pair("x_seq", x_seq, x_seq_perturbed)
    check_number("decay", decay, above=0.0, most=1.0)
    gains = _gain_per_step(gain, x_seq.shape[0])
    dtype = state_dtype(x_seq)
    if not isinstance(decay, Tensor) and not isinstance(gain, Tensor):
        u_seq = x_seq.to(dtype) - x_seq_perturbed.to(dtype)
        if gain != 1.0:
            u_seq = gain * u_seq
        # torch leaves it untyped
        eps_seq: Tensor = _Leak.apply(u_seq, decay, False)  # type: ignore[no-untyped-call]
        return eps_seq
    eps = torch.zeros_like(x_seq[0], dtype=dtype)
    steps = []
    for x, x_perturbed, gain_t in zip(x_seq, x_seq_perturbed, gains, strict=True):
        dx = x.to(dtype) - x_perturbed.to(dtype)
        eps = charge(eps, dx, decay=decay, gain=gain_t, v_reset=None)
        steps.append(eps)
    return torch.stack(steps)


def membrane_potential(
    x_seq: Tensor,
    *,
    decay: float | Tensor,
    gain: float | Tensor = 1.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    v_init: float | Tensor | None = None,
    spike_seq: Tensor | None = None,
) -> Tensor:
    """Membrane potential after the reset, recomputed from the input currents.
    由输入电流重新计算膜电位。

    Equation::

        h[t] = decay * v[t-1] + gain[t] * x[t]   (+ (1 - decay) * v_reset for a hard reset)
        v[t] = (1 - s[t]) * h[t] + s[t] * v_reset      (v_reset None: h[t] - s[t] * v_threshold)

    This is for measurements: no gradient flows through spikes that are recomputed here.

    Args:
        x_seq: Input currents [T, N, *].
        decay: Fraction of the potential kept per step, in (0, 1].
        gain: Input gain, one number or a tensor [T].
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None for a soft reset.
        v_init: Potential before the first step; None means ``v_reset``, or 0 for a soft reset.
        spike_seq: Spikes [T, N, *] that the neuron emitted; None computes them as ``h >=
            v_threshold``.

    Returns:
        Potentials [T, N, *], in float32 for half-precision currents.

    Raises:
        ValueError: If shapes differ, there is no step, ``decay`` is outside (0, 1] or ``gain`` is
            not [T].

    Source: charge, fire and reset of SpikingJelly's LIF neuron; Ding et al. (ICML 2024), section 3.

    Examples:
        >>> membrane_potential(torch.full((3, 1), 0.6), decay=0.5).flatten()
        tensor([0.6000, 0.9000, 0.0000])
    """
    if spike_seq is not None:
        _check_pair("x_seq and spike_seq", x_seq, spike_seq)
    check_number("decay", decay, above=0.0, most=1.0)
    gains = _gain_per_step(gain, x_seq.shape[0])
    start = v_init if v_init is not None else v_reset or 0.0
    v = torch.zeros_like(x_seq[0], dtype=state_dtype(x_seq)) + start
    steps = []
    for t, (x, gain_t) in enumerate(zip(x_seq, gains, strict=True)):
        h = charge(v, x.to(v.dtype), decay=decay, gain=gain_t, v_reset=v_reset)
        spike = fire(h, v_threshold) if spike_seq is None else spike_seq[t].to(h.dtype)
        v = reset(h, spike, v_threshold=v_threshold, v_reset=v_reset)
        steps.append(v)
    return torch.stack(steps)


def full_perturbation(v_seq: Tensor, v_seq_perturbed: Tensor) -> Tensor:
    """Perturbation [T, N, *] of the membrane potential with the reset, ``d[t] = v[t] - v~[t]``.
    包含复位的膜电位扰动。

    The potentials are those after the reset: a neuron's ``v_seq``, or :func:`membrane_potential` of
    both runs.

    Args:
        v_seq: Potentials [T, N, *] of the clean run.
        v_seq_perturbed: Potentials [T, N, *] of the perturbed run.

    Raises:
        ValueError: If the shapes differ or there is no step.

    Source: Ding et al. (ICML 2024), membrane potential perturbation before the reset is dropped.

    Examples:
        >>> x = torch.full((3, 1), 0.6)
        >>> full_perturbation(
        ...     membrane_potential(x, decay=0.5), membrane_potential(x - 0.1, decay=0.5)
        ... ).flatten()
        tensor([ 0.1000,  0.1500, -0.8750])
    """
    _check_pair("v_seq", v_seq, v_seq_perturbed)
    return v_seq - v_seq_perturbed


def ms_mppd(eps: Tensor, norm: Norm = "l2") -> Tensor:
    """Mean square of the perturbation over time, batch and features, or its mean absolute value.
    扰动的均方值。

    Equation: ``mean(eps^2)`` for ``"l2"``, ``mean(|eps|)`` for ``"l1"``.

    Args:
        eps: Perturbation, usually [T, N, *].
        norm: ``"l2"`` or ``"l1"``.

    Raises:
        ValueError: If ``norm`` is unknown.

    Source: l2 is MS-MPPD of Ding et al. (ICML 2024); l1 is the form its follow-up prefers.

    Examples:
        >>> ms_mppd(torch.tensor([1.0, -2.0])), ms_mppd(torch.tensor([1.0, -2.0]), norm="l1")
        (tensor(2.5000), tensor(1.5000))
    """
    if check_choice("norm", norm, NORMS) == "l2":
        return F.mse_loss(eps, eps.new_zeros(()).expand_as(eps))  # backward in one pass
    return eps.abs().mean()


def spike_train_distance(spike_seq: Tensor, spike_seq_perturbed: Tensor) -> Tensor:
    """Share of the steps at which two spike trains differ, ``sum_t |s[t] - s~[t]| / T``, [N, *].
    脉冲序列距离。

    Args:
        spike_seq: Spikes [T, N, *] of the clean run.
        spike_seq_perturbed: Spikes [T, N, *] of the perturbed run.

    Raises:
        ValueError: If the shapes differ or there is no step.

    Source: STD^2 / T, an indicator that Ding et al. (ICML 2024) compare with.

    Examples:
        >>> spike_train_distance(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]]))
        tensor([1.])
    """
    _check_pair("spike_seq", spike_seq, spike_seq_perturbed)
    difference = _real(spike_seq) - _real(spike_seq_perturbed)
    return difference.abs().mean(0)


def tasad(spike_seq: Tensor, spike_seq_perturbed: Tensor) -> Tensor:
    """Time-averaged spike-activity distance, ``|mean_t s~[t] - mean_t s[t]|``, [N, *].
    时间平均脉冲活动距离。

    Args:
        spike_seq: Spikes [T, N, *] of the clean run.
        spike_seq_perturbed: Spikes [T, N, *] of the perturbed run.

    Raises:
        ValueError: If the shapes differ or there is no step.

    Source: TASAD, an indicator that Ding et al. (ICML 2024) compare with.

    Examples:
        >>> tasad(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]]))
        tensor([0.])
    """
    _check_pair("spike_seq", spike_seq, spike_seq_perturbed)
    rate = _real(spike_seq).mean(0)
    rate_perturbed = _real(spike_seq_perturbed).mean(0)
    return (rate_perturbed - rate).abs()


class _Leak(torch.autograd.Function):
    """``eps[t] = decay * eps[t-1] + u[t]`` of a constant decay, saving nothing; with ``reverse`` it
    runs back in time.

    The map is linear and its transpose is the same recursion run the other way, so it can be
    differentiated any number of times.
    """

    @staticmethod
    def forward(ctx: Any, u_seq: Tensor, decay: float, reverse: bool) -> Tensor:
        ctx.decay = decay
        ctx.reverse = reverse
        eps_seq = u_seq.clone()
        steps = eps_seq.unbind(0)
        if reverse:
            steps = steps[::-1]
        for before, now in pairwise(steps):
            now.add_(before, alpha=decay)
        return eps_seq

    @staticmethod
    def backward(ctx: Any, grad_seq: Tensor) -> tuple[Tensor, None, None]:
        # as above
        grad = _Leak.apply(grad_seq, ctx.decay, not ctx.reverse)  # type: ignore[no-untyped-call]
        return grad, None, None


def _check_pair(name: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"{name}: both must have the same shape [T, N, *], got {shapes}")
    if first.ndim == 0 or first.shape[0] == 0:
        raise ValueError(
            f"{name}: there must be at least one time step in dimension 0, got shape "
            f"{tuple(first.shape)}"
        )


def _gain_per_step(gain: float | Tensor, steps: int) -> Iterable[float | Tensor]:
    if not isinstance(gain, Tensor) or gain.ndim == 0:
        return [gain] * steps
    if gain.shape != (steps,):
        raise ValueError(
            f"gain must be a number or have shape [T] = [{steps}], got {tuple(gain.shape)}"
        )
    return gain.unbind(0)


def _real(spike_seq: Tensor) -> Tensor:
    return spike_seq if spike_seq.is_floating_point() else spike_seq.float()
