"""Names of backends and the modules behind them."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from sj_robust.ops.dlif import cpp, cupy_launch, eager, triton_launch
from sj_robust.ops.dlif.config import (
    DLIFConfig,
    InputGradients,
    Inputs,
    OutputGradients,
    Outputs,
    state_dtype,
)
from sj_robust.ops.surrogate import Surrogate

__all__ = [
    "CUDA_KERNELS",
    "KERNELS",
    "Implementation",
    "backward",
    "failing_reason",
    "forward",
    "implementation",
    "room_for_gradients",
    "room_for_outputs",
    "unavailable_reason",
]

KERNELS: dict[str, Any] = {"cpp": cpp, "cupy": cupy_launch, "triton": triton_launch}
"""Backends that may be missing on a machine."""
CUDA_KERNELS = ("cupy", "triton")
"""Those of a GPU, the fastest first."""


class Implementation(Protocol):
    """What a backend provides, for contiguous tensors [T, *] and [*]."""

    def unsupported_reason(self, x_seq: Tensor, surrogate: Surrogate) -> str | None:
        """Why this call cannot run here, or None."""

    def forward(self, inputs: Inputs, outputs: Outputs) -> None:
        """Fill the outputs that are there."""

    def backward(self, inputs: Inputs, grads: OutputGradients, found: InputGradients) -> None:
        """Fill the gradients that are there."""


def forward(backend: Implementation, inputs: Inputs, store_v_seq: bool) -> Outputs:
    """Outputs of a backend."""
    outputs = room_for_outputs(inputs.x_seq, store_v_seq)
    backend.forward(inputs, outputs)
    return outputs


def room_for_outputs(x_seq: Tensor, store_v_seq: bool) -> Outputs:
    """Outputs to be filled."""
    dtype, new = state_dtype(x_seq), functools.partial(torch.empty, device=x_seq.device)
    return Outputs(
        spike_seq=new(x_seq.shape, dtype=x_seq.dtype),
        v=new(x_seq.shape[1:], dtype=dtype),
        v_seq=new(x_seq.shape, dtype=dtype) if store_v_seq else None,
    )


def backward(
    backend: Implementation, inputs: Inputs, grads: OutputGradients, needs_v_init: bool
) -> InputGradients:
    """Gradients by a backend."""
    found = room_for_gradients(inputs.x_seq, needs_v_init)
    backend.backward(inputs, grads, found)
    return found


def room_for_gradients(x_seq: Tensor, needs_v_init: bool) -> InputGradients:
    """Gradients to be filled."""
    dtype, new = state_dtype(x_seq), functools.partial(torch.empty, device=x_seq.device)
    return InputGradients(
        x_seq=new(x_seq.shape, dtype=x_seq.dtype),
        input_gain=new(x_seq.shape[:1], dtype=dtype),
        v_init=new(x_seq.shape[1:], dtype=dtype) if needs_v_init else None,
    )


def implementation(name: str, threads_per_block: int | None = None) -> Implementation:
    """The implementation of a name; only ``"cupy"`` reads the block size."""
    if name == "cupy" and threads_per_block is not None:
        return cupy_launch.Launcher(threads_per_block=threads_per_block)
    found: Implementation = KERNELS.get(name, eager)
    return found


def unavailable_reason(name: str) -> str | None:
    """What keeps a backend from running on this machine, or None. It touches no GPU."""
    reason: str | None = KERNELS[name].unavailable_reason() if name in KERNELS else None
    return reason


def failing_reason(name: str) -> str | None:
    """As :func:`unavailable_reason`, but a kernel for a GPU is tried, once and in no CUDA graph's
    capture.
    """
    reason = unavailable_reason(name)
    if reason is not None or name not in CUDA_KERNELS or not torch.cuda.is_available():
        return reason
    return None if torch.cuda.is_current_stream_capturing() else _failure(name)


@functools.cache
def _failure(name: str) -> str | None:
    """What goes wrong with one neuron on the current GPU: a compiler, header or library may be
    missing.
    """
    with ThreadPoolExecutor(1) as thread:  # where no tracer of torch is at work
        try:
            device = torch.device("cuda", torch.cuda.current_device())
            found = thread.submit(_spikes_of_one_neuron, name, device).result()
        except torch.OutOfMemoryError:  # which says nothing of the kernel
            raise
        except Exception as error:  # of a compiler that a kernel needs, or of the driver
            text = " ".join(str(error).split())
            return f"a first call failed with {type(error).__name__}: {text}"
    if found == [0.0, 1.0]:
        return None
    return f"a first call gave the spikes {found} instead of [0.0, 1.0]"


def _spikes_of_one_neuron(name: str, device: torch.device) -> list[float]:
    x_seq = torch.tensor([[0.5], [0.75]], device=device)
    gain = torch.ones(2, device=device)
    config = DLIFConfig(
        decay=0.5,
        v_threshold=1.0,
        v_reset=0.0,
        surrogate=Surrogate(),
        detach_reset=False,
    )
    outputs = forward(KERNELS[name], Inputs(x_seq, gain, None, config), store_v_seq=False)
    spikes: list[float] = outputs.spike_seq.flatten().tolist()
    return spikes


# As torch.compiler.assume_constant_result does, which loads the compiler: it need not look into
# these functions.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
failing_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
