"""The operators ``bounded_steps``, ``train_sums`` and ``joint_sums``."""

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, Literal

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import HOST_NAMES, Surrogate
from sj_robust.ops.dlif.operator import define, present
from sj_robust.ops.trains import cpp, reference
from sj_robust.ops.trains.config import (
    Constants,
    Currents,
    StepBounds,
    Trained,
    Trains,
    Windows,
)

__all__ = [
    "BoundsBackend",
    "bounded_steps",
    "chosen_backend",
    "in_float32",
    "joint_sums",
    "train_sums",
    "trained_reason",
]

BoundsBackend = Literal["auto", "cpp", "reference"]


def chosen_backend(
    backend: BoundsBackend, like: Tensor, windows: Windows, *, soft: bool = False
) -> BoundsBackend:
    """What runs a call: of ``"auto"`` the compiled kernel where it can.

    Raises:
        ValueError: If a named backend cannot run it; with the reason.
    """
    if backend == "reference":
        return backend
    reason = cpp.unavailable_reason() or cpp.unsupported_reason(like, windows)
    if reason is None and soft:
        reason = "the kernel supports only hard resets"
    if reason is None:
        return "cpp"
    if backend == "cpp":
        raise ValueError(f"backend 'cpp' cannot bound this layer: {reason}")
    return "reference"


def bounded_steps(
    currents: Currents,
    constants: Constants,
    windows: Windows,
    *,
    backend: BoundsBackend = "auto",
) -> StepBounds:
    """Bounds of potentials and spikes of a layer from its start on.
    脉冲层电位与脉冲的上下界。

    Equation: see :func:`sj_robust.ops.trains.reference.bounded_steps`. Every backend gives the same
    numbers, bit for bit.

    Args:
        currents: Bounds of the currents, and of sums over time if there are windows.
        constants: Numbers of the neuron and of its rounding.
        windows: Which windows are told apart.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``.

    Raises:
        ValueError: If a named backend cannot run the call.
    """
    chosen = chosen_backend(backend, currents.low, windows, soft=constants.soft)
    given = [getattr(currents, field.name) for field in fields(Currents)]
    found = _bounded_steps(*given, **asdict(constants), kept=windows.kept, backend=chosen)
    return StepBounds(*found)


def train_sums(
    weights: Tensor,
    trains: Trains,
    windows: Windows,
    *,
    narrow: float | None = None,
    backend: BoundsBackend = "auto",
) -> tuple[Tensor, Tensor]:
    """Least and largest ``sum_t weights[f, t] s[t]`` over the trains of M neurons.
    脉冲序列加权和的上下界。

    Equation: see :func:`sj_robust.ops.trains.reference.path_sums`. Backends differ by what float64
    rounds in a sum of T terms.

    Args:
        weights: Of the first steps, [F, T], in float64.
        trains: The trains.
        windows: Which windows were told apart when their cases were found.
        narrow: If given, centres and radii in float32 are returned, the radii so wide that they
            cover what the conversion rounds, and float64's own rounding by this factor.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``.

    Returns:
        Least and largest sums [F, M] in float64; or centres and radii in float32.

    Raises:
        ValueError: If a named backend cannot run the call.
    """
    chosen = chosen_backend(backend, trains.sure, windows)
    given = [getattr(trains, field.name) for field in fields(Trains)]
    low, high = _train_sums(weights, *given, kept=windows.kept, narrow=narrow, backend=chosen)
    return low, high


def trained_reason(like: Tensor, neuron: Surrogate, windows: Windows) -> str | None:
    """What keeps the kernel from training's bounds of a layer, or None."""
    reason = cpp.unavailable_reason() or cpp.unsupported_training(like, windows)
    if reason is None and neuron.kind not in HOST_NAMES:
        reason = f"the kernel supports the surrogates {tuple(HOST_NAMES)}, got {neuron.kind!r}"
    return reason


def joint_sums(
    sums: tuple[Tensor, Tensor],
    weights: Tensor,
    powers: Tensor,
    neuron: Trained,
    windows: Windows,
) -> tuple[Tensor, Tensor]:
    """Least and largest ``sum_t weights[f, t] s[t]`` of M neurons with hard resets, with gradients
    to all tensors, by the compiled kernel. 可微的脉冲加权和上下界。

    Equation: see :func:`sj_robust.ops.trains.reference.differentiable_sums`, with which it agrees
    bit for bit; gradients agree up to rounding.

    Args:
        sums: Smallest and largest sum of every window by row, [W, M].
        weights: Of all steps, [F, T].
        powers: Of the decay, from 0 to T.
        neuron: The neuron.
        windows: Which windows are told apart.
    """
    low, high = _joint_sums(*sums, weights, powers, **neuron.arguments, kept=windows.kept)
    return low, high


class _JointSums(torch.autograd.Function):
    """Saves what the operator takes and nothing else; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., tuple[Tensor, ...]],
        low: Tensor,
        high: Tensor,
        weights: Tensor,
        powers: Tensor,
        call: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(low, high, weights, powers)
        ctx.call = call
        return run(low, high, weights, powers, **call)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = _joint_sums_backward(*grads, *ctx.saved_tensors, **ctx.call)
        return None, *found, None


def _run_joint(
    low: Tensor, high: Tensor, weights: Tensor, powers: Tensor, *, kept: int, **neuron: Any
) -> tuple[Tensor, Tensor]:
    return cpp.joint_sums((low, high), weights, powers, Trained(**neuron), Windows(kept))


def _joint_fake(
    low: Tensor, high: Tensor, weights: Tensor, powers: Tensor, **constants: Any
) -> tuple[Tensor, Tensor]:
    least = weights.new_empty(len(weights), low.shape[1])
    return least, torch.empty_like(least)


def _run_joint_backward(*tensors: Tensor, kept: int, **neuron: Any) -> tuple[Tensor, ...]:
    least, most, low, high, weights, powers = tensors
    return cpp.joint_sums_backward(
        (least, most), (low, high), weights, powers, Trained(**neuron), Windows(kept)
    )


def _joint_backward_fake(*tensors: Tensor, **constants: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(part) for part in tensors[2:])


def _run_steps(*tensors: Tensor | None, kept: int, backend: str, **constants: Any) -> Any:
    currents = Currents(*tensors)  # type: ignore[arg-type]  # the first two are there
    given = Constants(**{**constants, "gains": tuple(constants["gains"])})
    run = cpp.bounded_steps if backend == "cpp" else reference.bounded_steps
    found = run(currents, given, Windows(kept))
    return tuple(getattr(found, field.name) for field in fields(StepBounds))


def _steps_fake(low: Tensor, *others: Tensor | None, **constants: Any) -> tuple[Tensor, ...]:
    found = [torch.empty_like(low) for _ in range(6)]
    cases: list[Tensor | None] = [None, None]
    if others[-1] is not None:
        cases = [torch.empty_like(low, dtype=torch.int16) for _ in range(2)]
    return present([*found, *cases], low.to(torch.int16))


def _run_sums(
    weights: Tensor, *tensors: Tensor | None, kept: int, narrow: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    trains = Trains(*tensors)  # type: ignore[arg-type]  # the first five are there
    if backend == "cpp":
        return cpp.train_sums(weights, trains, Windows(kept), narrow=narrow)
    low, high = reference.train_sums(weights, trains, Windows(kept))
    return (low, high) if narrow is None else in_float32(low, high, narrow)


def in_float32(low: Tensor, high: Tensor, slack: float) -> tuple[Tensor, Tensor]:
    """Centres and radii in float32 of all that lies between two ends in float64."""
    centre = (low + high) / 2
    radius = slack * ((high - low) / 2)
    rounded = centre.float()
    lost = (centre - rounded).abs()
    wider = slack * (radius + lost)
    return rounded, wider.float()


def _sums_fake(
    weights: Tensor, sure: Tensor, *others: Tensor | None, narrow: float | None, **constants: Any
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if narrow is None else torch.float32
    low = weights.new_empty(len(weights), sure.shape[1], dtype=dtype)
    return low, torch.empty_like(low)


_CONSTANTS = (
    "float decay, float[] gains, float rest, float threshold, float above, float below, bool soft, "
    "float charge_unit, float charge_least, float reset_unit, float reset_least"
)
_bounded_steps = define(
    "bounded_steps(Tensor low, Tensor high, Tensor? known_low, Tensor? known_high, Tensor? error, "
    f"Tensor? sums_low, Tensor? sums_high, *, {_CONSTANTS}, int kept, str backend) -> "
    "(Tensor h_low, Tensor h_high, Tensor sure, Tensor possible, Tensor v_low, Tensor v_high, "
    "Tensor sure_cases, Tensor possible_cases)",
    kernel=_run_steps,
    fake=_steps_fake,
)
_train_sums = define(
    "train_sums(Tensor weights, Tensor sure, Tensor possible, Tensor place, Tensor sure_cases, "
    "Tensor possible_cases, Tensor? spikes, Tensor? first, Tensor? last, *, int kept, "
    "float? narrow, str backend) -> (Tensor low, Tensor high)",
    kernel=_run_sums,
    fake=_sums_fake,
)
_NEURON = "float threshold, str surrogate, float alpha, float width, int kept"
_joint_sums = define(
    f"joint_sums(Tensor low, Tensor high, Tensor weights, Tensor powers, *, {_NEURON}) -> "
    "(Tensor least, Tensor most)",
    kernel=_run_joint,
    fake=_joint_fake,
    gradient=_JointSums,
)
_joint_sums_backward = define(
    "joint_sums_backward(Tensor grad_least, Tensor grad_most, Tensor low, Tensor high, "
    f"Tensor weights, Tensor powers, *, {_NEURON}) -> "
    "(Tensor grad_low, Tensor grad_high, Tensor grad_weights, Tensor grad_powers)",
    kernel=_run_joint_backward,
    fake=_joint_backward_fake,
)
