"""Chooses the implementation for a backend name."""

import functools
import warnings

import torch
from torch import Tensor

from sj_robust.ops.dlif import operator, reference
from sj_robust.ops.dlif.backends import (
    CUDA_KERNELS,
    failing_reason,
    implementation,
    unavailable_reason,
)
from sj_robust.ops.dlif.config import (
    DLIFConfig,
    Inputs,
    Outputs,
    check_arguments,
    state_dtype,
)
from sj_robust.ops.registration import differentiates_by_functorch, in_onnx_export, is_traced
from sj_robust.ops.surrogate import Surrogate

__all__ = [
    "BACKENDS",
    "available_backends",
    "check_backend",
    "choose_backend",
    "dlif_multi_step",
    "unavailable_reason",
]

BACKENDS = ("auto", "reference", "eager", "torch", "cpp", "cupy", "triton")
"""Names of backends; ``"auto"`` chooses, ``"torch"`` is another name of ``"eager"``."""
_ALIASES = {"torch": "eager"}
_TRIANGLE = Surrogate()
_FASTEST_FIRST = {"cpu": ("cpp", "eager"), "cuda": (*CUDA_KERNELS, "eager")}


def dlif_multi_step(
    x_seq: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None = None,
    *,
    decay: float,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate: Surrogate | None = None,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    backend: str = "auto",
    threads_per_block: int | None = None,
) -> Outputs:
    """Run one layer of DLIF neurons over a sequence.

    Equation: ``h[t] = decay * v[t-1] + input_gain[t] * x[t]`` (plus ``(1 - decay) * v_reset`` for a
    hard reset), ``s[t] = h[t] >= v_threshold``, then ``v[t] = (1 - s[t]) * h[t] + s[t] * v_reset``
    or, for ``v_reset=None``, ``v[t] = h[t] - s[t] * v_threshold``.

    Args:
        x_seq: Input currents, [T, N, *], floating point.
        input_gain: Learnable gain per step, [T].
        v_init: Potential before the first step, [N, *]; None means ``v_reset``, or 0 for a soft
            reset.
        decay: Fraction of the potential kept per step, in (0, 1].
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None subtracts the threshold instead.
        surrogate: Surrogate of the spike; None means the triangle of width 1.
        detach_reset: Whether the reset is detached from the gradient.
        store_v_seq: Whether the potential after every reset is also returned.
        backend: A name listed by :func:`available_backends`, or ``"auto"``, which uses the fastest
            one that can run the call.
        threads_per_block: Block size of the CUDA kernel, only used by ``"cupy"``; None lets the
            kernel choose it.

    Returns:
        Spikes [T, N, *] in the dtype of ``x_seq``, last potential [N, *] and potentials [T, N, *]
        or None; potentials are float64 for float64 inputs and float32 otherwise.

    Raises:
        TypeError: If ``x_seq`` is not floating point.
        ValueError: If a shape does not fit, the backend is unknown, or it cannot run this call.
        RuntimeError: If the named backend is not available on this machine.

    Source: Ding et al. (ICML 2024), the DLIF neuron.

    Examples:
        >>> spikes, v, _ = dlif_multi_step(
        ...     torch.full((3, 1), 0.6), torch.tensor([1.0, 1.0, 2.0]), decay=0.5
        ... )
        >>> spikes.flatten(), v
        (tensor([0., 0., 1.]), tensor([0.]))
    """
    check_arguments(x_seq, input_gain, v_init)
    config = DLIFConfig(decay, v_threshold, v_reset, surrogate or _TRIANGLE, detach_reset)
    dtype = state_dtype(x_seq)
    input_gain = input_gain.to(dtype)
    v_init = None if v_init is None else v_init.to(dtype)
    name = choose_backend(backend, x_seq, config.surrogate)
    inputs = Inputs(x_seq, input_gain, v_init, config)
    if name == "reference":  # which needs no backward pass of its own
        spike_seq, v, potentials = reference.multi_step(inputs)
        return Outputs(spike_seq, v, potentials if store_v_seq else None)
    if x_seq.is_contiguous():
        return operator.multi_step(
            inputs, store_v_seq=store_v_seq, backend=name, threads_per_block=threads_per_block
        )
    order = _memory_order(x_seq)
    inputs = Inputs(
        x_seq=x_seq.permute(order).contiguous(),
        input_gain=input_gain,
        v_init=None if v_init is None else v_init.permute([dim - 1 for dim in order[1:]]),
        config=config,
    )
    spike_seq, v, v_seq = operator.multi_step(
        inputs, store_v_seq=store_v_seq, backend=name, threads_per_block=threads_per_block
    )
    inverse = [order.index(dim) for dim in range(x_seq.ndim)]
    return Outputs(
        spike_seq=spike_seq.permute(inverse),
        v=v.permute([dim - 1 for dim in inverse[1:]]),
        v_seq=None if v_seq is None else v_seq.permute(inverse),
    )


def choose_backend(backend: str, x_seq: Tensor, surrogate: Surrogate) -> str:
    """Name of the implementation that ``backend`` means for this input, never ``"auto"``.

    Args:
        backend: Name in :data:`BACKENDS`.
        x_seq: Input, [T, N, *].
        surrogate: Surrogate of the spike.

    Raises:
        ValueError: If the name is unknown or the named backend cannot run this input.
        RuntimeError: If the named backend is not available on this machine.

    Examples:
        >>> choose_backend("torch", torch.zeros(4, 2), Surrogate())
        'eager'
    """
    name = check_backend(backend)
    if name == "auto":
        for candidate in _FASTEST_FIRST.get(x_seq.device.type, ("eager",)):
            if (
                failing_reason(candidate) is None
                and _unsupported_reason(candidate, x_seq, surrogate) is None
            ):
                if (x_seq.device.type, candidate) == ("cuda", "eager"):
                    _warn_of_missing_kernels()
                return candidate
        return "reference"
    reason = _unsupported_reason(name, x_seq, surrogate)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run this call: {reason}; use backend='auto'")
    return name


def check_backend(backend: str) -> str:
    """The name without its alias, if the backend is known and available.

    Args:
        backend: Name in :data:`BACKENDS`.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If the backend is not available on this machine, with what is missing.

    Examples:
        >>> check_backend("torch")
        'eager'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    name = _ALIASES.get(backend, backend)
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}; or use backend='auto'")
    return name


def available_backends() -> dict[str, str]:
    """Every backend, with "available" or the reason why it is not available on this machine.

    Examples:
        >>> available_backends()["eager"]
        'available'
    """
    names = [name for name in BACKENDS if name != "auto" and name not in _ALIASES]
    return {name: failing_reason(name) or "available" for name in names}


def _warn_of_missing_kernels() -> None:
    """Say once that a GPU gets plain torch, with more than a hundred launches a layer, because no
    kernel is there.
    """
    reasons = {name: failing_reason(name) for name in CUDA_KERNELS}
    if (
        None not in reasons.values() and torch.cuda.is_available()
    ):  # else no kernel runs this call, or no GPU does
        _warn("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


# see backends.py
_warn_of_missing_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn(reasons: str) -> None:
    text = (
        "DLIF runs on the GPU by backend='eager', which is slow, since no kernel is available "
        f"there: {reasons}"
    )
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _unsupported_reason(name: str, x_seq: Tensor, surrogate: Surrogate) -> str | None:
    if name == "reference":
        return None
    if in_onnx_export():
        return "an ONNX model holds torch's own operators alone, which is backend='reference'"
    if differentiates_by_functorch():
        return (
            "torch.func.grad, vjp and the like differentiate only plain torch; use "
            "backend='reference'"
        )
    if surrogate.kind == "custom" and is_traced():
        return (
            "the surrogate is a Python function, which kernels support neither in graphs of "
            "torch's tracers nor under torch.func.vmap; use backend='reference'"
        )
    reason: str | None = implementation(name).unsupported_reason(x_seq, surrogate)
    return reason


def _memory_order(x_seq: Tensor) -> list[int]:
    """Dimensions as they lie in memory, time first, so that channels-last inputs are not copied."""
    strides = x_seq.stride()
    return [0, *sorted(range(1, x_seq.ndim), key=lambda dim: (-strides[dim], dim))]
