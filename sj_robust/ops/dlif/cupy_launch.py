"""Launches ``kernel.cu`` through CuPy. CuPy itself is imported when a kernel is wanted, not
before.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sj_robust.ops.dlif.config import (
    HOST_NAMES,
    InputGradients,
    Inputs,
    OutputGradients,
    Outputs,
    Surrogate,
    import_failure,
    no_gpu_reason,
)

__all__ = [
    "LONGEST_SEQUENCE_IN_REGISTERS",
    "THREADS_PER_BLOCK",
    "Variant",
    "backward",
    "forward",
    "kernel_text",
    "unavailable_reason",
    "unsupported_reason",
]

THREADS_PER_BLOCK = 128
LONGEST_SEQUENCE_IN_REGISTERS = 32
_LONG_SEGMENT = 16  # steps per segment of a longer sequence
_VALUES_PER_THREAD = 32  # of x, and of h, that a thread of the backward kernel keeps in registers
_IO_TYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
_RESETS = {
    "zero": "RESET_TO_ZERO",
    "value": "RESET_TO_VALUE",
    "subtraction": "RESET_BY_SUBTRACTION",
}
_OPTIONS = ("--std=c++17",)
_NULL = np.int64(0)


def unavailable_reason() -> str | None:
    """What keeps CuPy kernels from running on this machine, with the remedy, or None."""
    return no_gpu_reason() or _cupy_reason()


def unsupported_reason(x_seq: Tensor, surrogate: Surrogate) -> str | None:
    """Why this call cannot run here, or None. Reads the tensor's device and dtype only."""
    if x_seq.device.type != "cuda":
        return f"x_seq must be on a CUDA device, got {x_seq.device}"
    if x_seq.dtype not in _IO_TYPES:
        return f"x_seq must be float32, float16 or bfloat16, got {x_seq.dtype}"
    if surrogate.kind not in HOST_NAMES:
        return (
            f"the CUDA kernel supports the surrogates {tuple(HOST_NAMES)}, got {surrogate.kind!r}"
        )
    return None


def forward(inputs: Inputs, outputs: Outputs) -> None:
    """Fill spikes [T, *], last potential [*], potentials [T, *] if they are there."""
    x_seq, config = inputs.x_seq, inputs.config
    T, M = len(x_seq), outputs.v.numel()
    is_long = T > LONGEST_SEQUENCE_IN_REGISTERS
    variant = Variant(
        io=_IO_TYPES[x_seq.dtype],
        steps=1 if is_long else T,
        is_long=is_long,
        vec=_vector_width(M, 4, x_seq, inputs.v_init),
        reset=_RESETS[config.reset],
        v_seq=outputs.v_seq is not None,
    )
    _launch(
        variant,
        inputs,
        spike_seq=outputs.spike_seq,
        v_last=outputs.v,
        v_seq=outputs.v_seq,
    )


def backward(inputs: Inputs, grads: OutputGradients, found: InputGradients) -> None:
    """Fill the gradients of ``x_seq``, ``input_gain`` and, if it is there, ``v_init``."""
    x_seq, config = inputs.x_seq, inputs.config
    T, M = len(x_seq), x_seq[0].numel()
    is_long = T > LONGEST_SEQUENCE_IN_REGISTERS
    steps = _LONG_SEGMENT if is_long else T
    variant = Variant(
        io=_IO_TYPES[x_seq.dtype],
        steps=steps,
        is_long=is_long,
        vec=_vector_width(M, _VALUES_PER_THREAD // steps, x_seq, inputs.v_init, *grads),
        reset=_RESETS[config.reset],
        v_seq=grads.v_seq is not None,
        detach=config.detach_reset,
        surrogate=HOST_NAMES[config.surrogate.kind],
    )
    new = functools.partial(torch.empty, dtype=torch.float32, device=x_seq.device)
    partial_grad_gain = new((variant.blocks(M), T))
    _launch(
        variant,
        inputs,
        grad_spike_seq=grads.spike_seq,
        grad_v_last=grads.v,
        grad_v_seq=grads.v_seq,
        grad_x_seq=found.x_seq,
        grad_v_init=found.v_init,
        partial_grad_gain=partial_grad_gain,
        # of the potential, one per segment
        checkpoints=new((math.ceil(T / steps) - 1, M)) if is_long else None,
    )
    found.input_gain.copy_(partial_grad_gain.sum(0, dtype=torch.float64))


@dataclass(frozen=True)
class Variant:
    """One kernel: arguments of a macro of ``kernel.cu``, explained there; a forward kernel has no
    surrogate.
    """

    io: str
    steps: int
    is_long: bool
    vec: int
    reset: str
    v_seq: bool
    detach: bool = False
    surrogate: str | None = None

    @property
    def name(self) -> str:
        """What the kernel is called."""
        return "dlif_forward" if self.surrogate is None else "dlif_backward"

    def blocks(self, neurons: int) -> int:
        """Number of blocks that cover all neurons."""
        return -(-neurons // (self.vec * THREADS_PER_BLOCK))

    def source(self) -> str:
        """The CUDA text of this kernel alone."""
        arguments = [self.name, THREADS_PER_BLOCK, self.io, self.steps, self.is_long, self.vec]
        arguments += [self.reset, self.v_seq]
        if self.surrogate is not None:
            arguments += [self.detach, self.surrogate]
        words = []
        for one in arguments:
            word = str(one)
            words.append(word.lower() if isinstance(one, bool) else word)
        line = f"{self.name.upper()}({', '.join(words)})"
        return "\n".join([kernel_text(), line, ""])


@functools.cache
def kernel_text() -> str:
    """The CUDA text shared by all variants."""
    return resources.files(__package__).joinpath("kernel.cu").read_text(encoding="utf-8")


@functools.lru_cache
def _floats(*values: float) -> tuple[np.float32, ...]:
    return tuple(np.float32(value) for value in values)


def _vector_width(neurons: int, at_most: int, *tensors: Tensor | None) -> int:
    """Neighbouring neurons per thread: 4, 2 or 1, as the row length and the alignment of every
    tensor allow.
    """
    width = min(at_most, math.gcd(neurons, 4))
    for tensor in tensors:
        if tensor is None:
            continue
        while width > 1 and tensor.data_ptr() % (width * tensor.itemsize):
            width //= 2
    return width


_FORWARD = ("x_seq", "input_gain", "v_init", "spike_seq", "v_last", "v_seq")
_BACKWARD = (
    "x_seq",
    "input_gain",
    "v_init",
    "grad_spike_seq",
    "grad_v_last",
    "grad_v_seq",
    "grad_x_seq",
    "grad_v_init",
    "partial_grad_gain",
    "checkpoints",
)
"""Pointers that a kernel takes, in the order of ``kernel.cu``."""
_CONSTANTS = ("decay", "leak_current", "v_threshold", "v_reset")
"""Its constants, in the same order; backward takes alpha as well."""


def _launch(variant: Variant, inputs: Inputs, **others: Tensor | None) -> None:
    """Launch a kernel on tensors by the names of its parameters; an absent one is None."""
    x_seq, input_gain, v_init, config = inputs
    T = len(x_seq)
    M = x_seq[0].numel()
    if M == 0:
        return
    is_forward = variant.surrogate is None
    tensors = {"x_seq": x_seq, "input_gain": input_gain, "v_init": v_init, **others}
    names = _FORWARD if is_forward else _BACKWARD
    pointers = [_pointer(tensors[name]) for name in names]
    numbers = config.numbers
    constants = _floats(*(numbers[name] for name in _CONSTANTS))
    if not is_forward:
        constants += _floats(config.surrogate.alpha)
    of_device, of_stream = _contexts()
    device = x_seq.device
    stream = torch.cuda.current_stream(device).cuda_stream
    with of_device(device.index), of_stream(stream):  # CuPy restores its own
        kernel = _compiled(variant, device)
        grid = (variant.blocks(M),)
        block = (THREADS_PER_BLOCK,)
        kernel(grid, block, (*pointers, np.int64(M), np.int32(T), *constants))


def _pointer(tensor: Tensor | None) -> np.int64:
    return _NULL if tensor is None else np.int64(tensor.data_ptr())


@functools.cache
def _contexts() -> tuple[Callable[[int | None], Any], Callable[[int], Any]]:
    """What makes CuPy's context of a device, from its index, and of a stream, from its handle."""
    cuda = importlib.import_module("cupy").cuda
    if not hasattr(cuda.Stream, "from_external"):  # before CuPy 14, which deprecates the other
        return cuda.Device, cuda.ExternalStream
    return cuda.Device, lambda stream: cuda.Stream.from_external(_ForeignStream(stream))


class _ForeignStream(NamedTuple):
    """A stream under the CUDA stream protocol, which torch's own class speaks only in newer
    releases.
    """

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


@functools.cache
def _compiled(variant: Variant, device: torch.device) -> Any:
    """The kernel, compiled for the current device, which is ``device``; CuPy keeps the binary on
    disk as well.
    """
    cupy = importlib.import_module("cupy")
    kernel = cupy.RawKernel(variant.source(), variant.name, options=_OPTIONS)
    try:
        kernel.compile()
    except Exception as error:  # of CuPy, of the driver, OSError for a missing library
        raise RuntimeError(
            f"CuPy could not compile the DLIF kernel on {device}: {type(error).__name__}: {error}. "
            f"If a CUDA library or header is missing, {_install_command()} brings them"
        ) from error
    return kernel


@functools.cache
def _cupy_reason() -> str | None:
    """Why CuPy cannot be used although torch sees a GPU, told from what really happened."""
    install = _install_command()
    reason = import_failure(
        "CuPy",
        "cupy",
        lambda: importlib.import_module("cupy"),
        if_missing=f"; {install}",
        if_broken=install,
    )
    if reason is not None:
        return reason
    cupy = importlib.import_module("cupy")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # of the CUDA runtime
        return (
            f"CuPy {cupy.__version__} cannot reach the GPU that torch sees: "
            f"{type(error).__name__}: {error}; CuPy must fit the driver and CUDA "
            f"{torch.version.cuda} of torch: {install}"
        )
    if count:
        return None
    return f"CuPy {cupy.__version__} sees no GPU, although torch does; {install}"


def _install_command() -> str:
    major = (torch.version.cuda or "12").split(".")[0]
    return f'pip install "cupy-cuda{major}x[ctk]"'
