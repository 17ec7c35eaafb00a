"""Input gains chosen for stability, and the gain as a differentiable penalty."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sj_robust.neuron.charging import Charging, find_neurons
from sj_robust.proofs.gains.gain import l2_gain, neuron_gains, peak_gain, time_operator

__all__ = ["GainDesign", "gain_penalty", "gain_scalars", "optimal_input_gain"]

GainObjective = Literal["l2", "peak"]
Held = Literal["mean", "response"]


@dataclass(frozen=True)
class GainDesign:
    """Optimal input gains, compared with constant ones.

    Attributes:
        input_gain: The optimal input gains [T], float64.
        gain: Exact L2 (or peak) gain with them.
        lower_bound: Lower bound of the gain with any input gains under the same constraint, by
            duality; equal to ``gain`` up to rounding.
        constant_gain: The gain with every input gain equal to the mean.
        response: Potential [T] that a constant input of 1 reaches without spikes: the cost of the
            design.
        constant_response: The same with constant input gains.
    """

    input_gain: Tensor
    gain: float
    lower_bound: float
    constant_gain: float
    response: Tensor
    constant_response: Tensor


def optimal_input_gain(
    decay: float, T: int, *, mean: float = 1.0, objective: GainObjective = "l2", held: Held = "mean"
) -> GainDesign:
    """Input gains of a given mean with the smallest L2 or peak gain.
    在均值固定时使增益最小的输入增益。

    Equation: minimise ``||L diag(p)||_2`` (``"l2"``) or the L2-to-peak constant (``"peak"``)
    subject to ``c' p = mean * sum(c)``, with ``c = 1`` for ``held="mean"`` and ``c = L' 1`` for
    ``held="response"``, which fixes the mean potential under a constant input instead. Both
    objectives are convex in p.

    ``"l2"``: with ``K = L^-1 L^-T`` (tridiagonal) the optimum is ``p`` in proportion to ``c w^-2``,
    where w minimises the strictly convex ``w' K w + sum_t c[t]^2 w[t]^-2`` over w > 0, found by
    Newton's method. There ``K w = c^2 w^-3 = p^2 w``, so the positive w is the top singular vector
    and ``p = c w^-2`` has gain exactly 1. The dual bound ``gain(p) >= c' p / sqrt(sum_t c[t]^2
    w[t]^-2)``, which holds for every w with ``w' K w = 1``, shows that no other p has a lower gain.
    All entries of p are positive.

    ``"peak"``: in closed form, p falls by ``decay^2`` per step until the peak is reached at some
    step k, and stays at ``sqrt(1 - decay^2)`` times the peak from there on.

    Args:
        decay: Fraction of the potential kept per step, in (0, 1].
        T: Number of time steps.
        mean: Mean of the gains, > 0; for ``held="response"``, the constant gain with the same
            response.
        objective: ``"l2"`` or ``"peak"``.
        held: ``"mean"``, or (only for the objective ``"l2"``) ``"response"``.

    Raises:
        ValueError: If an argument is out of range or a name unknown, or ``held="response"`` is
            given for the peak.

    Source: derived here.

    Examples:
        >>> design = optimal_input_gain(0.99, 4)
        >>> [round(p, 2) for p in design.input_gain.tolist()]
        [0.6, 0.67, 0.9, 1.82]
        >>> round(design.gain, 3), round(design.constant_gain, 3)
        (2.41, 2.843)
    """
    if not 0.0 < mean < float("inf"):
        raise ValueError(
            f"mean must be > 0 and finite, got {mean}; it is the mean of the input gains"
        )
    if objective not in ("l2", "peak"):
        raise ValueError(f"objective must be 'l2' or 'peak', got {objective!r}")
    if held not in ("mean", "response"):
        raise ValueError(f"held must be 'mean' or 'response', got {held!r}")
    if held == "response" and objective == "peak":
        raise ValueError("held='response' is for objective='l2'; for the peak hold the mean")
    operator = time_operator(decay, T)
    c = torch.ones(T, dtype=torch.float64)
    if held == "response":
        c = operator.sum(0)
    if objective == "l2":
        measure = l2_gain
        shape, bound = _least_l2(decay, c)
    else:
        measure = peak_gain
        shape, bound = _least_peak(decay, T)
    p = shape * (mean * c.sum() / (c @ shape))
    constant = torch.full_like(p, mean)
    return GainDesign(
        input_gain=p,
        gain=float(measure(decay, T, p)),
        lower_bound=float(bound * mean * c.sum()),
        constant_gain=float(measure(decay, T, constant)),
        response=operator @ p,
        constant_response=operator @ constant,
    )


def gain_penalty(net: nn.Module, *, normalized: bool = False) -> Tensor:
    """Sum over DLIF layers of the squared L2 gain over their T steps, differentiable in p.
    可微的 L2 增益惩罚。

    Equation: ``sum over layers of ||L_decay diag(p)||_2^2``; with ``normalized`` each term is
    divided by ``mean(|p|)^2``. A small p lowers the first form, but a batch norm before the neuron
    can undo that; the second one depends only on the shape of p and is smallest at
    :func:`optimal_input_gain`. The gradient of the first one is ``2 p[t] * (L' u)[t]^2`` with the
    top left singular vector u, which is unique unless p is 0. It is computed in float64 on the CPU:
    there are only T numbers per layer.

    Args:
        net: A network with DLIF neurons; other neurons have no learnable gain and are ignored.
        normalized: Whether each gain is divided by the mean of ``|p|``.

    Returns:
        A scalar in float64 on the CPU, differentiable in every ``input_gain``; NaN if one of them
        is not finite.

    Raises:
        ValueError: If the network has no DLIF neuron.

    Source: derived here; :func:`l2_gain`.

    Examples:
        >>> from sj_robust import DLIFNode
        >>> net = nn.Sequential(nn.Linear(2, 3), DLIFNode(T=8))
        >>> value = gain_penalty(net)
        >>> value.backward()
        >>> round(value.item(), 3), net[1].input_gain.grad.shape
        (27.705, torch.Size([8]))
    """
    gains = []
    decays = []
    for charging in _chargings(net).values():
        if charging.input_gain is not None:
            gains.append(charging.input_gain)
            decays.append(torch.as_tensor(charging.decay, dtype=torch.float64))
    if not gains:
        raise ValueError(
            f"gain_penalty needs a network with DLIF neurons, {type(net).__name__} has none; "
            "turn its neurons into DLIF with replace_neurons"
        )
    T = max(len(gain) for gain in gains)
    # Zeros in front bring all to one length; they do not change a norm, since without an input the
    # potential is 0 before the first step.
    padded = []
    for gain in gains:
        missing = T - len(gain)
        padded.append(functional.pad(gain, (missing, 0)))
    stacked = torch.stack(padded).cpu().double()
    if not bool(torch.isfinite(stacked).all()):
        return stacked.sum() * torch.nan  # the training stops and tells at which step
    operators = time_operator(torch.stack(decays), T, stacked)
    squares: Tensor = torch.linalg.matrix_norm(operators, 2).square()
    if normalized:
        lengths = torch.tensor([len(gain) for gain in gains], dtype=torch.float64)
        means = stacked.abs().sum(1) / lengths
        squares = squares / means.clamp(min=1e-100).square()
    return squares.sum()


def gain_scalars(net: nn.Module, T: int | None = None) -> dict[str, float]:
    """L2 and peak gain of every spiking layer, under the names of a training's log.
    供日志记录的各层增益。

    Args:
        net: A SpikingJelly network.
        T: Number of time steps of layers without gains of their own; None leaves those out.

    Raises:
        ValueError: If the network has no neuron.

    Source: :func:`neuron_gains`.

    Examples:
        >>> from sj_robust import DLIFNode
        >>> scalars = gain_scalars(nn.Sequential(DLIFNode(T=8)))
        >>> {name: round(value, 3) for name, value in scalars.items()}
        {'l2_gain/0': 5.264, 'peak_gain/0': 2.732}
    """
    scalars: dict[str, float] = {}
    for name, charging in _chargings(net).items():
        steps = T if charging.input_gain is None else len(charging.input_gain)
        if steps is not None:
            gains = neuron_gains(charging, steps)
            scalars[f"l2_gain/{name}"] = gains.l2
            scalars[f"peak_gain/{name}"] = gains.peak
    return scalars


def _chargings(net: nn.Module) -> dict[str, Charging]:
    """How every neuron of known dynamics charges, by name."""
    neurons, _, _ = find_neurons(net)
    return {name: neuron.charging() for name, neuron in neurons.items()}


def _least_l2(decay: float, c: Tensor) -> tuple[Tensor, float]:
    """Optimal gains up to scale, and the dual bound on the gain per unit of ``c' p``, as
    :func:`optimal_input_gain` says.

    Newton's method; a step is halved until it descends.
    """
    T = len(c)
    inverse = torch.eye(T, dtype=torch.float64)  # of L
    inverse.diagonal(-1).fill_(-decay)
    K = inverse @ inverse.T
    c_squared = c.square()

    def value(w: Tensor) -> Tensor:
        return w @ K @ w + (c / w).square().sum()

    def descends(w: Tensor, step: Tensor, decrease: Tensor) -> bool:
        """Whether a step decreases the value by at least ``decrease``, up to rounding."""
        after = w + step
        if bool(after.min() <= 0):
            return False
        return not bool(value(after) > value(w) * (1.0 + 1e-14) - decrease)

    first = max(1.0 - decay, 1.0 / T) ** -0.5
    w = torch.full((T,), first, dtype=torch.float64)
    for _ in range(200):
        slope = 2.0 * (K @ w - c_squared * w.pow(-3))
        curvature = 2.0 * K + torch.diag(6.0 * c_squared * w.pow(-4))
        step = torch.linalg.solve(curvature, -slope)
        decrease = -(slope @ step)
        size = 1.0
        while not descends(w, size * step, 0.25 * size * decrease):
            size /= 2
        w = w + size * step
        if decrease < 1e-24 * value(w):
            break
    bound = (w @ K @ w * (c / w).square().sum()).rsqrt()
    return c * w.pow(-2), float(bound)


def _least_peak(decay: float, T: int) -> tuple[Tensor, float]:
    """As :func:`_least_l2` for the peak, with gains that sum to ``c' p``, c = 1.

    With ``rate = decay^2`` the peak is the maximum over t of ``sum_{s <= t} rate^(t-s) p[s]^2``,
    under the square root.
    """
    rate = decay**2
    steady = (1.0 - rate) ** 0.5
    steps = torch.arange(T, dtype=torch.float64)
    for k in range(T):  # first step at which the peak, 1, is reached
        so_far = steps[: k + 1]
        falling = rate**so_far
        at_peak = falling.square() * rate ** (k - so_far)
        p = torch.full((T,), steady, dtype=torch.float64)
        p[: k + 1] = falling / at_peak.sum().sqrt()
        if rate * p[k] <= steady:
            break
    # Lower bound by duality. For any weights w[t] >= 0 of the steps,
    #     peak^2 >= sum_s m[s] p[s]^2 / sum_t w[t]    with m[s] = sum_{t >= s} rate^(t-s) w[t],
    # and sum_s m[s] p[s]^2 >= (sum_s p[s])^2 / sum_s 1 / m[s] by Cauchy and Schwarz.
    # The optimal weights are those with m = 1 / p.
    m = p.reciprocal()
    following = torch.cat((m[1:], m.new_zeros(1)))
    weights = (m - rate * following).clamp(min=0.0)
    total_of_inverses = (1.0 / m).sum()
    bound = (weights.sum() * total_of_inverses).rsqrt()
    return p, float(bound)
