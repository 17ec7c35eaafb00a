"""Sums over trains for training on the CPU with the compiled kernels."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.dlif import cpp
from sj_robust.ops.dlif.config import HOST_NAMES, Surrogate
from sj_robust.ops.dlif.cpp import load_library
from sj_robust.ops.trains.config import ChainGates, ChainPlaces, Trained, Windows

__all__ = ["chain_sums", "chain_sums_backward", "joint_sums", "unsupported_reason"]

_INTERFACE = 3  # sjr_trains_interface() of kernel.cpp
_SLOTS = 16  # MAX_SLOTS of job.h
_LANES = 8  # what the rows of weights are padded to


def unsupported_reason(like: Tensor, surrogate: Surrogate, windows: Windows) -> str | None:
    """What keeps the kernel from training's bounds of a layer, or None."""
    library = _load()
    if isinstance(library, str):
        return library
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return f"the kernel trains float32 and float64 on the CPU, got {like.dtype}"
    if windows.kept + 2 > _SLOTS:
        return f"the kernel supports {_SLOTS - 2} windows, got {windows.kept}"
    if surrogate.kind not in HOST_NAMES:
        return f"the kernel supports the surrogates {tuple(HOST_NAMES)}, got {surrogate.kind!r}"
    return None


def joint_sums(
    sums: tuple[Tensor, Tensor], weights: Tensor, powers: Tensor, neuron: Trained, windows: Windows
) -> tuple[Tensor, Tensor]:
    """Least and largest ``sum_t weights[f, t] s[t]`` of M neurons with hard resets, with gradients
    to all tensors. 可微的脉冲加权和上下界。

    Equation: see :func:`sj_robust.ops.trains.reference.differentiable_sums`, with which it agrees
    bit for bit; gradients agree up to rounding.

    Args:
        sums: Smallest and largest sum of every window by row, [W, M].
        weights: Of all steps, [F, T].
        powers: Of the decay, from 0 to T.
        neuron: The neuron.
        windows: Which windows are told apart.
    """
    apply: Any = _JointSums.apply
    least, most = apply(*sums, weights, powers, neuron, windows)
    return least, most


class _JointSums(torch.autograd.Function):
    """Saves what it takes and nothing else; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        low: Tensor,
        high: Tensor,
        weights: Tensor,
        powers: Tensor,
        neuron: Trained,
        windows: Windows,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(low, high, weights, powers)
        ctx.neuron = neuron
        ctx.windows = windows
        least = weights.new_empty(len(weights), low.shape[1])
        most = torch.empty_like(least)
        _run_joint((low, high), weights, powers, neuron, windows, least=least, most=most)
        return least, most

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # torch's
    def backward(ctx: Any, least: Tensor, most: Tensor) -> tuple[Tensor | None, ...]:
        low, high, weights, powers = ctx.saved_tensors
        F, T = weights.shape
        grad_low = weights.new_empty(low.shape)
        grad_high = torch.empty_like(grad_low)
        totals = torch.empty(F * T + T + 1, dtype=torch.float64)
        given = {"grad_least": least, "grad_most": most}
        found = {"grad_low": grad_low, "grad_high": grad_high, "totals": totals}
        sums = (low, high)
        _run_joint(sums, weights, powers, ctx.neuron, ctx.windows, **given, **found)
        d_weights, d_powers = torch.split(totals.to(low.dtype), [F * T, T + 1])
        return grad_low, grad_high, d_weights.view(F, T), d_powers.clone(), None, None


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
    for function in ("joint_sums", "chain_sums"):
        getattr(library, f"sjr_{function}_scratch_bytes").restype = ctypes.c_int64
    return library
