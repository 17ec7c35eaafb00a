"""Bounds of spiking layers on the CPU with the compiled kernels."""

import ctypes

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
    low = currents.low.contiguous()
    T, M = low.shape
    found = [torch.empty_like(low) for _ in STEP_PARTS]
    windowed = currents.sums_low is not None
    cases = [empty_cases(low), empty_cases(low)]
    if windowed:
        cases = [torch.empty_like(low, dtype=torch.int16) for _ in cases]
    kept = [
        _contiguous(part)
        for part in (
            currents.high,
            currents.known_low,
            currents.known_high,
            currents.error,
            currents.sums_low,
            currents.sums_high,
        )
    ]
    gains = torch.tensor(constants.gains, dtype=torch.float64)
    discounts = [constants.decay**n for n in range(T + 1)]
    powers = torch.tensor(discounts, dtype=torch.float64)
    names = ("high", "known_low", "known_high", "error", "sums_low", "sums_high")
    job = _StepsJob(
        T=T,
        M=M,
        kept=windows.kept,
        decay=constants.decay,
        rest=constants.rest,
        threshold=constants.threshold,
        above=constants.above,
        below=constants.below,
        charge_unit=constants.charge_unit,
        charge_least=constants.charge_least,
        reset_unit=constants.reset_unit,
        reset_least=constants.reset_least,
        windowed=windowed,
        **_machine(),
        **_pointers(gains=gains, powers=powers, low=low),
        **_pointers(**dict(zip(names, kept, strict=True))),
        **_pointers(**dict(zip(STEP_PARTS, found, strict=True))),
    )
    if windowed:
        job.sure_cases = cases[0].data_ptr()
        job.possible_cases = cases[1].data_ptr()
    _run("bounded_steps", job)
    return StepBounds(*found, *cases)


def train_sums(
    weights: Tensor, trains: Trains, windows: Windows, *, narrow: float | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`sj_robust.ops.trains.operator.train_sums`."""
    F, T = weights.shape
    M = trains.place.numel()
    padded = weights.new_zeros(-(-F // _LANES) * _LANES, T)
    padded[:F] = weights
    by_step = padded.T.contiguous()
    sure = trains.sure[:T].contiguous()
    possible = trains.possible[:T].contiguous()
    chained = trains.spikes is not None
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
    cases = [trains.sure_cases[:T].contiguous(), trains.possible_cases[:T].contiguous()]
    job = _SumsJob(
        T=T,
        F=len(padded),
        M=M,
        O=trains.sure_cases.shape[-1],
        kept=windows.kept,
        trains=0 if trains.spikes is None else len(trains.spikes),
        asked=F,
        chained=chained,
        narrow=narrow is not None,
        slack=narrow or 1.0,
        **_machine(),
        **_pointers(weights=by_step, sure=sure, possible=possible, place=trains.place),
        **_pointers(sure_cases=cases[0], possible_cases=cases[1]),
        **_pointers(first=trains.first, last=trains.last, least=tables[0], most=tables[1]),
        **_pointers(low=low, high=high),
    )
    _run("train_sums", job)
    return low, high


def joint_sums(
    sums: tuple[Tensor, Tensor], weights: Tensor, powers: Tensor, neuron: Trained, windows: Windows
) -> tuple[Tensor, Tensor]:
    """See :func:`sj_robust.ops.trains.operator.joint_sums`."""
    M = sums[0].shape[1]
    least = weights.new_empty(len(weights), M)
    most = torch.empty_like(least)
    job = _joint_job(sums, weights, powers, neuron, windows)
    job.least = least.data_ptr()
    job.most = most.data_ptr()
    _run("joint_sums", job)
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
    low = torch.empty_like(sums[0])
    high = torch.empty_like(low)
    totals = torch.empty(F * T + T + 1, dtype=torch.float64)
    job = _joint_job(sums, weights, powers, neuron, windows)
    job.grad_least = grads[0].data_ptr()
    job.grad_most = grads[1].data_ptr()
    job.grad_low = low.data_ptr()
    job.grad_high = high.data_ptr()
    job.totals = totals.data_ptr()
    _run("joint_sums", job)
    found = totals.to(low.dtype)
    d_weights = found[: F * T].view(F, T)
    d_powers = found[F * T :].clone()
    return low, high, d_weights, d_powers


def _joint_job(
    sums: tuple[Tensor, Tensor], weights: Tensor, powers: Tensor, neuron: Trained, windows: Windows
) -> "_JointJob":
    """A call; all tensors are contiguous."""
    F, T = weights.shape
    _check_dtypes(*sums, weights, powers)
    return _JointJob(
        T=T,
        F=F,
        M=sums[0].shape[1],
        kept=windows.kept,
        W=len(sums[0]),
        threshold=neuron.threshold,
        **_derivative(neuron, weights),
        **_machine(),
        **_pointers(sums_low=sums[0], sums_high=sums[1], weights=weights, powers=powers),
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
    job = _ChainJob(
        F=F,
        M=len(first),
        J=J,
        doubles=least.dtype == torch.float64,
        **_machine(),
        **_pointers(first=first, last=last, least=tables[0], most=tables[1]),
        **_pointers(least_sums=least, most_sums=most),
    )
    _run("chain_sums", job)
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
    tables = [
        torch.nn.functional.pad(table, (0, padding)).contiguous()
        for table in (chains.to_last, chains.from_first)
    ]
    low = torch.empty_like(chains.low)
    high = torch.empty_like(low)
    totals = torch.empty(2 * G + F * J, dtype=torch.float64)
    at = {}
    if places is not None:
        at["least_at"] = places.least.to(torch.int32).contiguous()
        at["most_at"] = places.most.to(torch.int32).contiguous()
    job = _ChainJob(
        F=F,
        M=len(low),
        J=J,
        G=G,
        S=2 * F + padding,
        centred=places is not None and places.centred,
        **_pointers(**at),
        **_derivative(neuron, low),
        **_machine(),
        **_pointers(first=chains.first, last=chains.last, low=chains.low, high=chains.high),
        **_pointers(grad_least=grads[0], grad_most=grads[1]),
        **_pointers(to_last=tables[0], from_first=tables[1]),
        **_pointers(scale=chains.scale, shift=chains.shift),
        **_pointers(grad_low=low, grad_high=high, totals=totals),
    )
    _run("chain_sums", job)
    of_scale, of_shift, values = torch.split(totals.to(low.dtype), [G, G, F * J])
    of_values = None if places is None else values.view(F, J)
    return low, high, of_scale, of_shift, of_values


def _check_dtypes(*tensors: Tensor) -> None:
    """Raise an error unless the kernel, which reads the memory of all as one type, may do so."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise ValueError(
            f"the bounds of a layer must have one dtype, got {sorted(map(str, dtypes))}"
        )


def _contiguous(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.contiguous()


def _pointers(**tensors: Tensor | None) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


def _machine() -> dict[str, int]:
    return {
        "instruction_set": cpp.chosen_instruction_set(),
        "threads": torch.get_num_threads(),
        "own_threads": cpp.is_forked(),
    }


def _run(function: str, job: ctypes.Structure) -> None:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(f"the compiled bounds are not available: {library}")
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
