"""DLIF on the CPU with the compiled kernels.

The kernel is built when the package is installed and is part of it; nothing is compiled or written
at run time. Without a C++ compiler the installation goes through without it and ``backend="auto"``
uses ``eager``.
"""

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import (
    HOST_NAMES,
    InputGradients,
    Inputs,
    OutputGradients,
    Outputs,
    Planes,
    Surrogate,
    is_repeated,
)

__all__ = [
    "INSTRUCTION_SETS",
    "INSTRUCTION_SET_VARIABLE",
    "SURROGATES",
    "backward",
    "chosen_instruction_set",
    "forward",
    "instruction_sets",
    "is_forked",
    "load_library",
    "run",
    "unavailable_reason",
    "unsupported_reason",
]

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
INSTRUCTION_SET_VARIABLE = "SJ_ROBUST_INSTRUCTION_SET"

_LIBRARY_NAME = "_kernel.so"  # setup.py gives it this name on every system
_INTERFACE = 9  # sjr_interface() of kernel.cpp
_PROCESS = os.getpid()
_STORAGE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SURROGATES = {kind: number for number, kind in enumerate(HOST_NAMES)}


def unavailable_reason() -> str | None:
    """What keeps the compiled kernel from running on this machine, or None."""
    library = _load()
    return library if isinstance(library, str) else None


def unsupported_reason(x_seq: Tensor, surrogate: Surrogate) -> str | None:
    """Why this call cannot run here, or None."""
    if x_seq.device.type != "cpu":
        return f"the compiled kernel runs on the CPU, x_seq is on {x_seq.device}"
    if x_seq.dtype not in _STORAGE:
        known = "float32, float64, float16 and bfloat16"
        return f"the compiled kernel supports {known}, got {x_seq.dtype}"
    if surrogate.kind not in SURROGATES:
        known = f"the surrogates {tuple(SURROGATES)}"
        return f"the compiled kernel supports {known}, got {surrogate.kind!r}"
    return None


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that this processor runs, best last; the best is used.

    The environment variable ``SJ_ROBUST_INSTRUCTION_SET`` names another one, to measure or to
    search a fault.

    Examples:
        >>> "baseline" in instruction_sets() or unavailable_reason() is not None
        True
    """
    library = _load()
    return (
        ()
        if isinstance(library, str)
        else INSTRUCTION_SETS[: library.sjr_best_instruction_set() + 1]
    )


def forward(inputs: Inputs, outputs: Outputs) -> None:
    """See :class:`sj_robust.ops.dlif.operator.Implementation`."""
    run("forward", inputs, s=outputs.spike_seq, v=outputs.v, v_seq=outputs.v_seq)


def backward(inputs: Inputs, grads: OutputGradients, found: InputGradients) -> None:
    """See :class:`sj_robust.ops.dlif.operator.Implementation`."""
    run(
        "backward",
        inputs,
        gs=grads.spike_seq,
        gv=grads.v,
        gvs=grads.v_seq,
        gx=found.x_seq,
        gain_grad=found.input_gain,
        gv_init=found.v_init,
    )


def run(
    function: str, inputs: Inputs, planes: Planes | None = None, **tensors: Tensor | None
) -> None:
    """Call ``sjr_`` + ``function`` of the library; raises RuntimeError if there is no library.

    Steps that are all the same may be expanded from one. ``tensors``, without gaps and in the order
    of the currents, go to the fields of ``sjr::Job`` that bear their names.
    """
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(f"the compiled DLIF kernel is not available: {library}")
    x, config = inputs.x_seq, inputs.config
    size = x.shape[1:].numel()
    tensors |= {"x": x, "gain": inputs.input_gain, "v_init": inputs.v_init}
    job = _Job(
        T=x.shape[0],
        M=size,
        x_stride=0 if is_repeated(x) else size,
        **config.numbers,
        alpha=config.surrogate.alpha,
        soft_reset=config.v_reset is None,
        detach_reset=config.detach_reset,
        surrogate=SURROGATES[config.surrogate.kind],
        storage=_STORAGE[x.dtype],
        instruction_set=chosen_instruction_set(),
        threads=torch.get_num_threads(),
        own_threads=is_forked(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )
    if planes is not None:
        job.plane = planes.height * planes.width
        job.channels = planes.channels
        job.height = planes.height
        job.width = planes.width
        job.channels_last, job.pool = planes.channels_last, planes.pool
    scratch = torch.empty(library.sjr_scratch_bytes(ctypes.byref(job)), dtype=torch.uint8)
    job.scratch = scratch.data_ptr()
    getattr(library, f"sjr_{function}")(ctypes.byref(job))


def load_library() -> ctypes.CDLL | str:
    """The library of all compiled kernels, or the reason why there is none."""
    return _load()


def is_forked() -> bool:
    """Whether this process is a forked child, which has none of the threads of torch's OpenMP."""
    return os.getpid() != _PROCESS


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Job(ctypes.Structure):
    """Mirror of ``sjr::Job`` in job.h; what is not set is zero."""

    _fields_ = (
        *_fields(ctypes.c_int64, "T M x_stride"),
        *_fields(ctypes.c_double, "decay leak_current v_threshold v_reset alpha"),
        *_fields(ctypes.c_int32, "soft_reset detach_reset surrogate storage"),
        *_fields(ctypes.c_int32, "instruction_set threads own_threads"),
        *_fields(ctypes.c_void_p, "x gain v_init s v v_seq gs gv gvs gx gain_grad gv_init scratch"),
        *_fields(ctypes.c_int64, "stream channels plane height width"),
        *_fields(ctypes.c_int32, "channels_last pool"),
        *_fields(ctypes.c_void_p, "scale offset mean slope constant"),
        *_fields(ctypes.c_void_p, "channel_sums current g_current g_total"),
    )


def chosen_instruction_set() -> int:
    """Number of the instruction set that kernels take.

    Raises:
        ValueError: If the environment names one that this processor does not have.
    """
    available = instruction_sets()
    name = os.environ.get(INSTRUCTION_SET_VARIABLE, available[-1])
    if name not in available:
        raise ValueError(
            f"{INSTRUCTION_SET_VARIABLE} must be one of {available} on this processor, got {name!r}"
        )
    return INSTRUCTION_SETS.index(name)


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    path = Path(__file__).with_name(_LIBRARY_NAME)
    if not path.exists():
        return (
            "it was not built when sj_robust was installed, or this is a source tree that is not "
            "installed; install a C++ compiler (GCC or clang) and then sj_robust again"
        )
    try:
        library = ctypes.CDLL(str(path))
        interface = library.sjr_interface()
    except (OSError, AttributeError) as error:
        return (
            f"{path} cannot be loaded on this system ({error}); install sj_robust again on this "
            "machine"
        )
    if interface != _INTERFACE:
        return f"{path} belongs to another version of sj_robust; install sj_robust again"
    library.sjr_scratch_bytes.restype = ctypes.c_int64
    return library
