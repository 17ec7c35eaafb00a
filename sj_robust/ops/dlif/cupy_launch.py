"""Launches ``kernel.cu`` through CuPy. CuPy itself is imported when a kernel is wanted, not
before.
"""

import functools
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sj_robust.ops.dlif.config import (
    HOST_NAMES,
    NEEDS_GRAPH,
    DLIFConfig,
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
    "Launcher",
    "Variant",
    "backward",
    "forward",
    "kernel_text",
    "spliced_struct",
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
    if surrogate.kind != "custom":
        return None
    return _unusable_surrogate_reason(surrogate, x_seq.device)


@dataclass(frozen=True)
class Launcher:
    """An implementation of DLIF (see ``operator.Implementation``) with a chosen block size.

    Args:
        threads_per_block: A multiple of 32 from 32 to 1024. It decides how the gradient of
            ``input_gain`` is grouped before it is summed, and nothing else of the result.

    Raises:
        ValueError: If ``threads_per_block`` is not such a number.

    Examples:
        >>> Launcher(threads_per_block=512)
        Launcher(threads_per_block=512)
    """

    threads_per_block: int = THREADS_PER_BLOCK

    def __post_init__(self) -> None:
        """Check the block size."""
        if self.threads_per_block % 32 or not 32 <= self.threads_per_block <= 1024:
            raise ValueError(
                "threads_per_block must be a multiple of 32 from 32 to 1024, got "
                f"{self.threads_per_block}; on SpikingJelly 0.0.0.0.14 it is "
                "spikingjelly.configure.cuda_threads"
            )

    def unsupported_reason(self, x_seq: Tensor, surrogate: Surrogate) -> str | None:
        """Why this call cannot run here, or None."""
        return unsupported_reason(x_seq, surrogate)

    def forward(self, inputs: Inputs, outputs: Outputs) -> None:
        """Fill spikes [T, *], last potential [*], potentials [T, *] if they are there."""
        x_seq, config = inputs.x_seq, inputs.config
        T, M = len(x_seq), outputs.v.numel()
        is_long = T > LONGEST_SEQUENCE_IN_REGISTERS
        variant = Variant(
            threads=self.threads_per_block,
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

    def backward(self, inputs: Inputs, grads: OutputGradients, found: InputGradients) -> None:
        """Fill the gradients of ``x_seq``, ``input_gain`` and, if it is there, ``v_init``."""
        x_seq, config = inputs.x_seq, inputs.config
        T, M = len(x_seq), x_seq[0].numel()
        is_long = T > LONGEST_SEQUENCE_IN_REGISTERS
        steps = _LONG_SEGMENT if is_long else T
        surrogate = config.surrogate
        variant = Variant(
            threads=self.threads_per_block,
            io=_IO_TYPES[x_seq.dtype],
            steps=steps,
            is_long=is_long,
            vec=_vector_width(M, _VALUES_PER_THREAD // steps, x_seq, inputs.v_init, *grads),
            reset=_RESETS[config.reset],
            v_seq=grads.v_seq is not None,
            detach=config.detach_reset,
            surrogate=HOST_NAMES.get(surrogate.kind, "Spliced"),
            spliced=_cuda_text(surrogate) if surrogate.kind == "custom" else None,
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


_default = Launcher()
forward = _default.forward
backward = _default.backward


@dataclass(frozen=True)
class Variant:
    """One kernel: arguments of a macro of ``kernel.cu``, explained there; a forward kernel has no
    surrogate.
    """

    threads: int
    io: str
    steps: int
    is_long: bool
    vec: int
    reset: str
    v_seq: bool
    detach: bool = False
    surrogate: str | None = None
    spliced: str | None = None

    @property
    def name(self) -> str:
        """What the kernel is called."""
        return "dlif_forward" if self.surrogate is None else "dlif_backward"

    def blocks(self, neurons: int) -> int:
        """Number of blocks that cover all neurons."""
        return -(-neurons // (self.vec * self.threads))

    def source(self) -> str:
        """The CUDA text of this kernel alone."""
        arguments = [self.name, self.threads, self.io, self.steps, self.is_long, self.vec]
        arguments += [self.reset, self.v_seq]
        if self.surrogate is not None:
            arguments += [self.detach, self.surrogate]
        words = []
        for one in arguments:
            word = str(one)
            words.append(word.lower() if isinstance(one, bool) else word)
        own = "" if self.spliced is None else spliced_struct(self.spliced)
        line = f"{self.name.upper()}({', '.join(words)})"
        return "\n".join([kernel_text(), own, line, ""])


@functools.cache
def kernel_text() -> str:
    """The CUDA text shared by all variants."""
    return resources.files(__package__).joinpath("kernel.cu").read_text(encoding="utf-8")


def spliced_struct(text: str) -> str:
    """CUDA struct around the text that a SpikingJelly 0.0.0.0.14 surrogate writes for
    ``y="derivative", x="z"``.

    Examples:
        >>> "derivative = 1.0f - z;" in spliced_struct("derivative = 1f - z;")
        True
    """
    # an integer parameter, as in ATan(alpha=2), is written there as the illegal literal 2f
    text = re.sub(r"(?<![\w.])(?<!e[-+])(\d+)f\b", r"\1.0f", text)
    return (
        "struct Spliced {\n"
        "    static __device__ __forceinline__ float derivative(float z, float) {\n"
        f"        float derivative;\n{text}\n"
        "        return derivative;\n    }\n};"
    )


@runtime_checkable
class WritesCuda(Protocol):
    """A surrogate that offers the CUDA text of its derivative, as SpikingJelly 0.0.0.0.14's do."""

    spiking: bool

    def cuda_codes(self, y: str, x: str, dtype: str) -> str:
        """Statements that compute ``y`` from ``x``; NotImplementedError if there are none."""


def _cuda_text(surrogate: Surrogate) -> str | None:
    if not isinstance(surrogate.function, WritesCuda):
        return None
    try:
        return surrogate.function.cuda_codes(y="derivative", x="z", dtype="float")
    except NotImplementedError:  # what the base class of SpikingJelly's surrogates does
        return None


def _unusable_surrogate_reason(surrogate: Surrogate, device: torch.device) -> str | None:
    name = type(surrogate.function).__name__
    text = _cuda_text(surrogate)
    if text is None:
        return f"the surrogate {name} has no CUDA code (cuda_codes)"
    if surrogate.needs_graph:
        return f"the surrogate {name} {NEEDS_GRAPH}"
    if isinstance(surrogate.function, WritesCuda) and not surrogate.function.spiking:
        return (
            f"the surrogate {name} does not spike (spiking=False), and the kernel fires real spikes"
        )
    key = (text, type(surrogate.function), device)
    if key not in _TEXTS_TRIED:
        _TEXTS_TRIED[key] = _wrong_text_reason(name, surrogate, device)
    return _TEXTS_TRIED[key]


_TEXTS_TRIED: dict[tuple[str, type, torch.device], str | None] = {}


def _wrong_text_reason(name: str, surrogate: Surrogate, device: torch.device) -> str | None:
    """Run the text on a range of z: what another package writes is not believed unseen."""
    # an even number: neither 0 nor the round values where g jumps
    z = torch.linspace(-3.0, 3.0, 1200, device=device)
    config = DLIFConfig(0.0, 0.0, 0.0, surrogate, detach_reset=True)
    gain = torch.ones(1, device=device)
    inputs = Inputs(z[None], gain, None, config)
    grad_x_seq = torch.empty_like(z)[None]
    found = InputGradients(grad_x_seq, torch.empty(1, device=device), None)
    try:
        backward(inputs, OutputGradients(torch.ones_like(z)[None]), found)
    except _CompilationError as error:
        return f"the CUDA code of the surrogate {name} does not compile: {error}"
    derivative = found.x_seq[0]
    expected = surrogate.derivative(z)
    if torch.allclose(derivative, expected, rtol=1e-3, atol=1e-5):
        return None
    worst = (derivative - expected).abs().argmax()
    return (
        f"the CUDA code of the surrogate {name} disagrees with its gradient in torch "
        f"({derivative[worst]:.4g} instead of {expected[worst]:.4g} at z = {z[worst]:.4g})"
    )


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
        block = (variant.threads,)
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


class _CompilationError(RuntimeError):
    """The CUDA text did not become a kernel."""


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
        raise _CompilationError(
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
