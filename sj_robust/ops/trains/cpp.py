"""Bounds of spiking layers on the CPU with the compiled kernels."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.dlif import cpp
from sj_robust.ops.dlif.cpp import load_library
from sj_robust.ops.trains.config import (
    STEP_PARTS,
    ChainGates,
    ChainPlaces,
    Constants,
    Currents,
    StepBounds,
    Trained,
    Trains,
    Windows,
    empty_cases,
)
from sj_robust.ops.trains.reference import range_tables

__all__ = [
    "bounded_steps",
    "chain_sums",
    "chain_sums_backward",
    "joint_sums",
    "joint_sums_backward",
    "train_sums",
    "unavailable_reason",
    "unsupported_reason",
    "unsupported_training",
]

_INTERFACE = 3  # sjr_trains_interface() of kernel.cpp
_SLOTS = 16  # MAX_SLOTS of job.h
_LANES = 8  # what the rows of weights are padded to


def unavailable_reason() -> str | None:
    """What keeps the compiled kernel from running on this machine, or None."""
    library = _load()
    return library if isinstance(library, str) else None


def unsupported_reason(like: Tensor, windows: Windows) -> str | None:
    """Why a call cannot run here, or None."""
    if like.device.type != "cpu" or like.dtype != torch.float64:
        return f"the kernel bounds float64 on the CPU, got {like.dtype} on {like.device}"
    return _unsupported(windows)


def unsupported_training(like: Tensor, windows: Windows) -> str | None:
    """Why bounds for training cannot run here, or None."""
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return f"the kernel trains float32 and float64 on the CPU, got {like.dtype}"
    return _unsupported(windows)


def _unsupported(windows: Windows) -> str | None:
    if windows.kept + 2 > _SLOTS:
        return f"the kernel supports {_SLOTS - 2} windows, got {windows.kept}"
    return None


def bounded_steps(currents: Currents, constants: Constants, windows: Windows) -> StepBounds:
    """See :func:`sj_robust.ops.trains.reference.bounded_steps`; hard resets alone."""
    low = currents.low
    T, M = low.shape
    found = {name: torch.empty(T, M, dtype=torch.float64) for name in STEP_PARTS}
    windowed = currents.sums_low is not None
    cases = {name: empty_cases(low) for name in ("sure_cases", "possible_cases")}
    if windowed:
        cases = {name: torch.empty(T, M, dtype=torch.int16) for name in cases}
    numbers = vars(constants) | {"gains": torch.tensor(constants.gains, dtype=torch.float64)}
    del numbers["soft"]
    discounts = [constants.decay**n for n in range(T + 1)]
    _run(
        "bounded_steps",
        _StepsJob,
        T=T,
        M=M,
        kept=windows.kept,
        windowed=windowed,
        powers=torch.tensor(discounts, dtype=torch.float64),
        **numbers,
        **vars(currents),
        **found,
        **(cases if windowed else {}),
    )
    return StepBounds(**found, **cases)


def train_sums(
    weights: Tensor, trains: Trains, windows: Windows, *, narrow: float | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`sj_robust.ops.trains.operator.train_sums`."""
    F, T = weights.shape
    M = trains.place.numel()
    padded = weights.new_zeros(-(-F // _LANES) * _LANES, T)
    padded[:F] = weights
    tables: tuple[Tensor | None, Tensor | None] = (None, None)
    if trains.spikes is not None:
        assert trains.first is not None
        assert trains.last is not None
        width = int((trains.last - trains.first).max()) + 1 if M else 1
        levels = max(0, width.bit_length() - 1)
        tables = range_tables(padded, trains.spikes, levels)
    dtype = torch.float64 if narrow is None else torch.float32
    low = torch.empty(F, M, dtype=dtype)
    high = torch.empty_like(low)
    _run(
        "train_sums",
        _SumsJob,
        T=T,
        F=len(padded),
        M=M,
        O=trains.sure_cases.shape[-1],
        kept=windows.kept,
        trains=0 if trains.spikes is None else len(trains.spikes),
        asked=F,
        chained=trains.spikes is not None,
        narrow=narrow is not None,
        slack=narrow or 1.0,
        weights=padded.T,
        sure=trains.sure[:T],
        possible=trains.possible[:T],
        place=trains.place,
        sure_cases=trains.sure_cases[:T],
        possible_cases=trains.possible_cases[:T],
        first=trains.first,
        last=trains.last,
        least=tables[0],
        most=tables[1],
        low=low,
        high=high,
    )
    return low, high


def joint_sums(
    sums: tuple[Tensor, Tensor], weights: Tensor, powers: Tensor, neuron: Trained, windows: Windows
) -> tuple[Tensor, Tensor]:
    """See :func:`sj_robust.ops.trains.operator.joint_sums`."""
    least = weights.new_empty(len(weights), sums[0].shape[1])
    most = torch.empty_like(least)
    _run_joint(sums, weights, powers, neuron, windows, least=least, most=most)
    return least, most


def joint_sums_backward(
    grads: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
    weights: Tensor,
    powers: Tensor,
    neuron: Trained,
    windows: Windows,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both sums, of weights and of powers."""
    F, T = weights.shape
    low = weights.new_empty(sums[0].shape)
    high = torch.empty_like(low)
    totals = torch.empty(F * T + T + 1, dtype=torch.float64)
    given = {"grad_least": grads[0], "grad_most": grads[1]}
    found = {"grad_low": low, "grad_high": high, "totals": totals}
    _run_joint(sums, weights, powers, neuron, windows, **given, **found)
    d_weights, d_powers = torch.split(totals.to(low.dtype), [F * T, T + 1])
    return low, high, d_weights.view(F, T), d_powers.clone()


def _run_joint(
    sums: tuple[Tensor, Tensor],
    weights: Tensor,
    powers: Tensor,
    neuron: Trained,
    windows: Windows,
    **others: Tensor,
) -> None:
    F, T = weights.shape
    _check_dtypes(*sums, weights, powers)
    _run(
        "joint_sums",
        _JointJob,
        T=T,
        F=F,
        M=sums[0].shape[1],
        kept=windows.kept,
        W=len(sums[0]),
        threshold=neuron.threshold,
        **_derivative(neuron, weights),
        sums_low=sums[0],
        sums_high=sums[1],
        weights=weights,
        powers=powers,
        **others,
    )


def _derivative(neuron: Trained, like: Tensor) -> dict[str, float]:
    return {
        "alpha": neuron.alpha,
        "width": neuron.width,
        "surrogate": cpp.SURROGATES[neuron.surrogate],
        "doubles": like.dtype == torch.float64,
    }


def chain_sums(first: Tensor, last: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Entries [F, M] of tables [J, J, F] at first and last [M]."""
    J, _, F = tables[0].shape
    _check_dtypes(*tables)
    least = tables[0].new_empty(F, len(first))
    most = torch.empty_like(least)
    _run(
        "chain_sums",
        _ChainJob,
        F=F,
        M=len(first),
        J=J,
        doubles=least.dtype == torch.float64,
        first=first,
        last=last,
        least=tables[0],
        most=tables[1],
        least_sums=least,
        most_sums=most,
    )
    return least, most


def chain_sums_backward(
    grads: tuple[Tensor, Tensor],
    chains: ChainGates,
    neuron: Trained,
    places: ChainPlaces | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of both ends of the currents, of scales and shifts of the gates and, with places,
    of the trains' values [F, J].
    """
    F = len(grads[0])
    ends = (chains.low, chains.high)
    _check_dtypes(*grads, *ends, chains.to_last, chains.from_first, chains.scale, chains.shift)
    J = len(chains.to_last)
    G = len(chains.scale)
    padding = -2 * F % _LANES
    low = chains.low.new_empty(chains.low.shape)
    high = torch.empty_like(low)
    totals = torch.empty(2 * G + F * J, dtype=torch.float64)
    of_values: dict[str, Tensor | bool] = {}
    if places is not None:
        of_values["least_at"] = places.least.to(torch.int32)
        of_values["most_at"] = places.most.to(torch.int32)
        of_values["centred"] = places.centred
    _run(
        "chain_sums",
        _ChainJob,
        F=F,
        M=len(low),
        J=J,
        G=G,
        S=2 * F + padding,
        **_derivative(neuron, low),
        **of_values,
        first=chains.first,
        last=chains.last,
        low=chains.low,
        high=chains.high,
        grad_least=grads[0],
        grad_most=grads[1],
        to_last=torch.nn.functional.pad(chains.to_last, (0, padding)),
        from_first=torch.nn.functional.pad(chains.from_first, (0, padding)),
        scale=chains.scale,
        shift=chains.shift,
        grad_low=low,
        grad_high=high,
        totals=totals,
    )
    of_scale, of_shift, values = torch.split(totals.to(low.dtype), [G, G, F * J])
    return low, high, of_scale, of_shift, None if places is None else values.view(F, J)


def _check_dtypes(*tensors: Tensor) -> None:
    """Raise an error unless the kernel, which reads the memory of all as one type, may do so."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise ValueError(
            f"the bounds of a layer must have one dtype, got {sorted(map(str, dtypes))}"
        )


def _run(function: str, job_type: type[ctypes.Structure], **fields: Any) -> None:
    """Call a function of the library; tensors, made contiguous, go to the fields of its job that
    bear their names. Those that it writes are contiguous.
    """
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(f"the compiled bounds are not available: {library}")
    tensors = {name: one.contiguous() for name, one in fields.items() if isinstance(one, Tensor)}
    numbers = {name: one for name, one in fields.items() if isinstance(one, (bool, int, float))}
    job = job_type(
        **numbers,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        instruction_set=cpp.chosen_instruction_set(),
        threads=torch.get_num_threads(),
        own_threads=cpp.is_forked(),
    )
    size = getattr(library, f"sjr_{function}_scratch_bytes")(ctypes.byref(job))
    scratch = torch.empty(size // 8 + 8, dtype=torch.float64)
    job.scratch = scratch.data_ptr()
    getattr(library, f"sjr_{function}")(ctypes.byref(job))


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


_MACHINE = "instruction_set threads own_threads"


class _StepsJob(ctypes.Structure):
    """Mirror of ``sjr::StepsJob`` in job.h; what is not set is zero."""

    _fields_ = (
        *_fields(ctypes.c_int64, "T M kept"),
        *_fields(ctypes.c_double, "decay rest threshold above below"),
        *_fields(ctypes.c_double, "charge_unit charge_least reset_unit reset_least"),
        *_fields(ctypes.c_int32, f"{_MACHINE} windowed"),
        *_fields(ctypes.c_void_p, "gains powers low high known_low known_high error"),
        *_fields(ctypes.c_void_p, "sums_low sums_high"),
        *_fields(ctypes.c_void_p, " ".join(STEP_PARTS)),
        *_fields(ctypes.c_void_p, "sure_cases possible_cases scratch"),
    )


class _SumsJob(ctypes.Structure):
    """Mirror of ``sjr::SumsJob`` in job.h; what is not set is zero."""

    _fields_ = (
        *_fields(ctypes.c_int64, "T F M O kept trains asked chained narrow"),
        *_fields(ctypes.c_double, "slack"),
        *_fields(ctypes.c_int32, f"{_MACHINE} unused"),
        *_fields(ctypes.c_void_p, "weights sure possible place sure_cases possible_cases"),
        *_fields(ctypes.c_void_p, "first last least most low high scratch"),
    )


class _JointJob(ctypes.Structure):
    """Mirror of ``sjr::JointJob`` in job.h; what is not set is zero."""

    _fields_ = (
        *_fields(ctypes.c_int64, "T F M kept W"),
        *_fields(ctypes.c_double, "threshold alpha width"),
        *_fields(ctypes.c_int32, f"{_MACHINE} surrogate doubles unused"),
        *_fields(ctypes.c_void_p, "sums_low sums_high weights powers least most"),
        *_fields(ctypes.c_void_p, "grad_least grad_most grad_low grad_high totals scratch"),
    )


class _ChainJob(ctypes.Structure):
    """Mirror of ``sjr::ChainJob`` in job.h; what is not set is zero."""

    _fields_ = (
        *_fields(ctypes.c_int64, "F M J G S"),
        *_fields(ctypes.c_double, "alpha width"),
        *_fields(ctypes.c_int32, f"{_MACHINE} surrogate doubles centred"),
        *_fields(ctypes.c_void_p, "first last least most least_sums most_sums low high"),
        *_fields(ctypes.c_void_p, "grad_least grad_most to_last from_first scale shift"),
        *_fields(ctypes.c_void_p, "least_at most_at"),
        *_fields(ctypes.c_void_p, "grad_low grad_high totals scratch"),
    )


def _load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    library = load_library()
    if isinstance(library, str):
        return library
    try:
        interface = library.sjr_trains_interface()
    except AttributeError:
        interface = None
    if interface != _INTERFACE:
        return "the library belongs to another version of sj_robust; install sj_robust again"
    for function in ("bounded_steps", "train_sums", "joint_sums", "chain_sums"):
        getattr(library, f"sjr_{function}_scratch_bytes").restype = ctypes.c_int64
    return library
