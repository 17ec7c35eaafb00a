"""How much the leaky sum of a neuron can amplify a perturbation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sj_robust.neuron.charging import Charging

__all__ = [
    "NeuronGains",
    "l2_gain",
    "l2_gain_limit",
    "neuron_gains",
    "peak_gain",
    "printed_gain",
    "time_operator",
]

Array = NDArray[np.float64]


class NeuronGains(NamedTuple):
    """Gains of one neuron over T steps, each per unit of the norm of the linear map before it.

    Attributes:
        decay: Fraction of the potential kept per step.
        input_gain: Fixed times learnable input gain of every step [T], float64.
        l2: Exact L2 gain over T steps.
        l2_limit: Its limit for T -> infinity; None if the input gain changes over time.
        peak: Exact constant from L2 to the peak over time.
        printed: ``sqrt(1 / (1 - decay))`` of Theorem 3.1.
    """

    decay: float
    input_gain: Tensor
    l2: float
    l2_limit: float | None
    peak: float
    printed: float


def time_operator(
    decay: float | Tensor, T: int, input_gain: Tensor | Sequence[float] | None = None
) -> Tensor:
    """Matrix that sums input currents into the simplified perturbation. 时间方向的线性算子。

    Equation: ``A[t, s] = decay^(t-s) * input_gain[s]`` for s <= t, else 0, so that ``eps = A @ (W
    Ds)`` over time. Differentiable in both arguments; :func:`l2_gain` is its spectral norm,
    ``torch.linalg.matrix_norm(A, 2)``.

    Args:
        decay: Fraction of the potential kept per step, in (0, 1], a number or a tensor [...].
        T: Number of time steps.
        input_gain: Gain per step [..., T]; None for ones.

    Returns:
        [..., T, T] in float64.

    Raises:
        ValueError: If ``decay`` or ``T`` is out of range, or ``input_gain`` does not fit.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024), simplified
        perturbation dynamics.

    Examples:
        >>> time_operator(0.5, 3, torch.tensor([1.0, 1.0, 2.0]))
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 1.0000, 0.0000],
                [0.2500, 0.5000, 2.0000]], dtype=torch.float64)
    """
    decays, gains = _checked(decay, T, input_gain)
    age = torch.arange(T, device=decays.device)
    lag = (age[:, None] - age).clamp(min=0)
    return (decays[..., None, None] ** lag).tril() * gains[..., None, :]


def l2_gain(
    decay: float | Tensor, T: int, input_gain: Tensor | Sequence[float] | None = None
) -> Tensor:
    """Exact L2 gain over T steps, ``||L_decay diag(input_gain)||_2``. T 步内的精确 L2 增益。

    Equation, for every sequence of spike differences ``Ds`` and linear map ``W`` before the
    neuron::

        ||eps||_2 <= l2_gain * ||W||_2 * ||Ds||_2

    with equality for the worst ``Ds``. The gain is below gamma exactly while ``r[t] < 1`` for all t
    in ::

        r[t] = (input_gain[t] / gamma)^2 + decay^2 * r[t-1] / (1 - r[t-1]),    r[-1] = 0

    (the pivots ``1 - r`` of a Cholesky factorisation of the tridiagonal ``L^-1 L^-T -
    diag(input_gain)^2 / gamma^2``; a sum of positive terms, so nothing cancels). gamma is found by
    section to a relative 1e-12, rounded up. O(T). The result [...] is float64 on the CPU, without a
    graph; for a differentiable term see :func:`gain_penalty`.

    Args:
        decay: Fraction of the potential kept per step, in (0, 1], a number or a tensor [...]; 1 for
            IF.
        T: Number of time steps.
        input_gain: Gain per step [..., T], of any sign; None for ones.

    Raises:
        ValueError: If ``decay`` or ``T`` is out of range, or ``input_gain`` does not fit.

    Source: derived here; the recursion is the bounded real lemma for finite time (dqds form).

    Examples:
        >>> [round(float(l2_gain(0.99, T)), 3) for T in (4, 8, 16)]
        [2.843, 5.264, 9.887]
    """
    return _per_sequence(_largest_singular_value, decay, T, input_gain)


def peak_gain(
    decay: float | Tensor, T: int, input_gain: Tensor | Sequence[float] | None = None
) -> Tensor:
    """Exact constant from the L2 norm of a spike difference to the peak of the perturbation. L2
    到峰值的精确常数。

    Equation::

        max_t ||eps[t]||_2 <= peak_gain * ||W||_2 * ||Ds||_2
        peak_gain = max_t sqrt(sum over s <= t of (decay^(t-s) * input_gain[s])^2)

    by Cauchy-Schwarz over time, with equality for ``Ds[s]`` in proportion to ``decay^(t-s) *
    input_gain[s]``. Without ``input_gain`` it is ``sqrt((1 - decay^(2T)) / (1 - decay^2))``. Shape
    and type are those of :func:`l2_gain`.

    Args:
        decay: Fraction of the potential kept per step, in (0, 1], a number or a tensor [...].
        T: Number of time steps.
        input_gain: Gain per step [..., T], of any sign; None for ones.

    Raises:
        ValueError: If ``decay`` or ``T`` is out of range, or ``input_gain`` does not fit.

    Source: derived here.

    Examples:
        >>> round(float(peak_gain(0.99, 8)), 3)
        2.732
    """
    return _per_sequence(_largest_row_norm, decay, T, input_gain)


def l2_gain_limit(decay: float | Tensor) -> Tensor:
    """Limit of :func:`l2_gain` for many time steps, ``1 / (1 - decay)``.
    时间步趋于无穷时的 L2 增益。

    It is an upper bound of the gain for every T; with an input gain, multiply it by
    ``max_t |input_gain[t]|``. At decay 1, for a neuron without leak, it is infinite. Shape and type
    are those of :func:`l2_gain`.

    Args:
        decay: Fraction of the potential kept per step, in (0, 1], a number or a tensor [...].

    Raises:
        ValueError: If ``decay`` is out of range.

    Source: the l1 norm of the kernel ``decay^t``, reached by a constant perturbation.

    Examples:
        >>> l2_gain_limit(torch.tensor([0.5, 1.0]))
        tensor([2., inf], dtype=torch.float64)
    """
    decays, _ = _checked(decay, 1, None)
    return 1.0 / (1.0 - decays.detach().cpu())


def printed_gain(decay: float | Tensor) -> Tensor:
    """Constant of Theorem 3.1 as printed, ``sqrt(1 / (1 - decay))``. 论文定理 3.1 所印的常数。

    It is **not** an L2 gain: :func:`l2_gain` exceeds it at decay 0.5 from T = 3 on, 0.9 from T = 6,
    0.99 from T = 17. It does bound the peak, ``max_t ||eps[t]||_2 <= printed_gain * ||W||_2 *
    ||Ds||_2``, while ``|input_gain| <= 1``: the tight constant, :func:`peak_gain`, stays below
    ``1 / sqrt(1 - decay^2)``. At decay 1 it is infinite.

    Args:
        decay: Fraction of the potential kept per step, in (0, 1], a number or a tensor [...].

    Raises:
        ValueError: If ``decay`` is out of range.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024), Theorem 3.1.

    Examples:
        >>> round(float(printed_gain(0.5)), 3), round(float(l2_gain(0.5, 3)), 3)
        (1.414, 1.467)
    """
    return l2_gain_limit(decay).sqrt()


def neuron_gains(charging: Charging, T: int) -> NeuronGains:
    """Every gain of one neuron over T steps, from the way it charges. 单个神经元的各种增益。

    Args:
        charging: Decay and gains of an IF, LIF, PLIF or DLIF, as
            :func:`sj_robust.neuron.charging.find_neurons` reads them.
        T: Number of time steps, at most the number of learnable gains.

    Raises:
        ValueError: If a value is out of range or the neuron has fewer gains than T.

    Source: :func:`l2_gain`, :func:`peak_gain`, :func:`l2_gain_limit`, :func:`printed_gain`.

    Examples:
        >>> gains = neuron_gains(Charging(decay=0.5, gain=0.5), T=8)
        >>> round(gains.l2, 3), gains.l2_limit
        (0.913, 1.0)
    """
    decay = torch.as_tensor(charging.decay, dtype=torch.float64).detach().cpu()
    learned = charging.input_gain
    if learned is None:
        learned = torch.ones(T, dtype=torch.float64)
    if len(learned) < T:
        raise ValueError(
            f"T must be at most the neuron's {len(learned)} input gains, got {T}; build it with "
            "a larger T"
        )
    fixed = torch.as_tensor(charging.gain, dtype=torch.float64).detach().cpu()
    gains = fixed * learned.detach().cpu().double()[:T]
    first = gains[0].abs()
    constant = bool((gains.abs() == first).all())
    l2_limit = None
    if constant and first != 0:
        l2_limit = float(l2_gain_limit(decay) * first)
    return NeuronGains(
        decay=float(decay),
        input_gain=gains,
        l2=float(l2_gain(decay, T, gains)),
        l2_limit=l2_limit,
        peak=float(peak_gain(decay, T, gains)),
        printed=float(printed_gain(decay)),
    )


def _checked(
    decay: float | Tensor, T: int, input_gain: Tensor | Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """Decays [...] and gains [..., T] in float64 on one device."""
    if T < 1:
        raise ValueError(f"T must be >= 1, got {T}; it is the number of time steps")
    decays = torch.as_tensor(decay, dtype=torch.float64)
    if not bool(((decays > 0) & (decays <= 1)).all()):
        raise ValueError(
            f"decay must be in (0, 1], got {decay}; a neuron of time constant tau has decay 1 - "
            "1 / tau"
        )
    if input_gain is None:
        return decays, torch.ones(T, dtype=torch.float64, device=decays.device)
    gains = torch.as_tensor(input_gain, dtype=torch.float64)
    if gains.ndim == 0 or gains.shape[-1] != T:
        raise ValueError(
            f"input_gain must have shape [..., T] with T = {T}, got {tuple(gains.shape)}"
        )
    if not bool(torch.isfinite(gains).all()):
        raise ValueError("input_gain must be finite, but holds NaN or infinity")
    try:
        np.broadcast_shapes(decays.shape, gains.shape[:-1])
    except ValueError:
        raise ValueError(
            f"decay [...] and input_gain [..., T] must broadcast, got {tuple(decays.shape)} and "
            f"{tuple(gains.shape)}"
        ) from None
    return decays.to(gains.device), gains


def _per_sequence(
    gain: Callable[[Array, Array], Array],
    decay: float | Tensor,
    T: int,
    input_gain: Tensor | Sequence[float] | None,
) -> Tensor:
    """Apply ``gain(decays [n], gains [T, n])`` to every sequence of a batch; gains are scaled to a
    largest of 1.
    """
    decays, gains = _checked(decay, T, input_gain)
    decays = decays.detach().cpu()
    sizes = gains.detach().cpu().abs()
    shape = np.broadcast_shapes(decays.shape, sizes.shape[:-1])
    flat = decays.expand(shape).reshape(-1).numpy()
    by_sequence = sizes.expand(*shape, T).reshape(-1, T)
    columns = by_sequence.T.numpy()
    largest: Any = columns.max(axis=0)
    scaled = columns / np.where(largest > 0, largest, 1.0)
    found = gain(flat, scaled) * largest
    return torch.from_numpy(np.asarray(found)).reshape(shape)


def _largest_row_norm(decays: Array, gains: Array) -> Array:
    total = np.zeros_like(decays)
    largest = np.zeros_like(decays)
    for squared in gains**2:
        total = decays**2 * total + squared
        largest = np.maximum(largest, total)
    return np.sqrt(largest)


def _largest_singular_value(decays: Array, gains: Array) -> Array:
    """By section on a geometric grid between the peak gain and sqrt(T) times it, many candidates
    per sweep.
    """
    low = np.log(np.maximum(_largest_row_norm(decays, gains), 1.0))
    high = low + 0.5 * np.log(len(gains)) + 1e-12
    candidates = max(2, 2048 // max(len(decays), 1))
    fractions = np.arange(1, candidates) / candidates
    while (high - low).max(initial=0.0) > 1e-14:
        grid = low + fractions[:, None] * (high - low)
        above = _is_above(np.exp(grid), decays, gains)
        below = (~above).sum(axis=0)
        width = (high - low) / candidates
        high = low + (below + 1) * width
        low = low + below * width
    return np.where(gains.any(axis=0), np.exp(high), 0.0)


def _is_above(candidates: Array, decays: Array, gains: Array) -> NDArray[np.bool_]:
    """Whether each candidate [k, n] is above the gain of its sequence; see :func:`l2_gain`."""
    inverse = candidates**-2.0
    squared_decays = decays**2
    r = np.zeros_like(candidates)
    above = np.ones(candidates.shape, dtype=bool)
    for squared in gains**2:
        r = squared * inverse + squared_decays * (r / (1.0 - r))
        above &= r < 1.0
        np.minimum(r, 0.5, out=r, where=~above)
    return above
