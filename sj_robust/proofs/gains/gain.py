"""How much the leaky sum of a neuron can amplify a perturbation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
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


class NeuronGains(NamedTuple):
    """Gains of one neuron over T steps, each per unit of the norm of the linear map before it.

    Attributes:
        decay: Fraction of the potential kept per step.
        input_gain: Fixed times learnable input gain of every step [T], float64.
        l2: Exact L2 gain over T steps.
        peak: Exact constant from L2 to the peak over time.
        printed: ``sqrt(1 / (1 - decay))`` of Theorem 3.1.
    """

    decay: float
    input_gain: Tensor
    l2: float
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

    with equality for the worst ``Ds``: the largest singular value of :func:`time_operator`, rounded
    up. The result [...] is float64 on the CPU, without a graph; for a differentiable term see
    :func:`gain_penalty`.

    Args:
        decay: Fraction of the potential kept per step, in (0, 1], a number or a tensor [...]; 1 for
            IF.
        T: Number of time steps.
        input_gain: Gain per step [..., T], of any sign; None for ones.

    Raises:
        ValueError: If ``decay`` or ``T`` is out of range, or ``input_gain`` does not fit.

    Source: derived here.

    Examples:
        >>> [round(float(l2_gain(0.99, T)), 3) for T in (4, 8, 16)]
        [2.843, 5.264, 9.887]
    """
    operator = time_operator(decay, T, input_gain).detach().cpu()
    norm: Tensor = torch.linalg.matrix_norm(operator, 2)
    return norm * (1.0 + 1e-12)


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
    operator = time_operator(decay, T, input_gain).detach().cpu()
    rows: Tensor = torch.linalg.vector_norm(operator, dim=-1)
    return rows.amax(-1)


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

    Source: :func:`l2_gain`, :func:`peak_gain`, :func:`printed_gain`.

    Examples:
        >>> gains = neuron_gains(Charging(decay=0.5, gain=0.5), T=8)
        >>> round(gains.l2, 3)
        0.913
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
    return NeuronGains(
        decay=float(decay),
        input_gain=gains,
        l2=float(l2_gain(decay, T, gains)),
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
        decays + gains[..., 0]
    except RuntimeError:
        raise ValueError(
            f"decay [...] and input_gain [..., T] must broadcast, got {tuple(decays.shape)} and "
            f"{tuple(gains.shape)}"
        ) from None
    return decays.to(gains.device), gains
