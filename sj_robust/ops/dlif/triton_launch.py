"""Launches ``triton_kernel.py``. Triton itself is imported when a kernel is wanted, not before.

Under ``TRITON_INTERPRET=1``, which Triton reads when it is imported, the kernels run on the CPU,
slowly: for tests.
"""

import functools
import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import (
    HOST_NAMES,
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
    "BACKWARD_WARPS",
    "FORWARD_WARPS",
    "LONGEST_SEQUENCE_IN_REGISTERS",
    "Plan",
    "backward",
    "backward_plan",
    "forward",
    "forward_plan",
    "given",
    "launch",
    "limit_above",
    "unavailable_reason",
    "unsupported_reason",
]

LONGEST_SEQUENCE_IN_REGISTERS = 16
FORWARD_WARPS, BACKWARD_WARPS = 4, 1  # of a program; one warp alone sums without a barrier
_LONG_SEGMENT = 8  # steps per segment of a longer sequence
_BYTES_AT_ONCE = 16  # that a thread loads or stores of a tensor
# of a thread in a longer sequence, whose loops keep an address for every access
_MOST_NEURONS_OF_LONG = 4
# of x that a thread of the backward kernel reads in a segment, whose potentials it keeps
_BYTES_PER_THREAD = 128
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable_reason() -> str | None:
    """What keeps Triton kernels from running on this machine, with the remedy, or None."""
    reason = _triton_reason()
    if reason is not None:  # CPU builds of torch come without it: then the build is what is wrong
        return no_gpu_reason() or reason
    return None if _is_interpreted() else no_gpu_reason()


def unsupported_reason(x_seq: Tensor, surrogate: Surrogate) -> str | None:
    """Why this call cannot run here, or None. Reads the tensor's device and dtype only."""
    if _is_interpreted() and x_seq.device.type != "cpu":
        return f"under TRITON_INTERPRET=1 x_seq must be on the CPU, got {x_seq.device}"
    if not _is_interpreted() and x_seq.device.type != "cuda":
        return f"x_seq must be on a CUDA device, got {x_seq.device}"
    if x_seq.dtype not in _DTYPES:
        return f"x_seq must be float32, float16 or bfloat16, got {x_seq.dtype}"
    if surrogate.kind not in HOST_NAMES:
        return (
            f"the Triton kernel supports the surrogates {tuple(HOST_NAMES)}, got {surrogate.kind!r}"
        )
    return None


@dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for besides its tensors: the compile-time arguments of
    ``triton_kernel.py``.
    """

    FIRST: int
    LATER: int
    SEGMENT: int
    RESET: str
    BLOCK: int

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return FORWARD_WARPS

    def programs(self, neurons: int) -> int:
        """How many programs cover all neurons."""
        return -(-neurons // self.BLOCK)


@dataclass(frozen=True)
class _BackwardPlan(Plan):
    DETACH: bool
    SURROGATE: str

    @property
    def warps(self) -> int:
        return BACKWARD_WARPS


def forward_plan(dtype: torch.dtype, steps: int, config: DLIFConfig) -> Plan:
    """How the forward kernel is cut for so many steps of a dtype."""
    first, later, segment = _cut(steps)
    return Plan(
        FIRST=first,
        LATER=later,
        SEGMENT=segment,
        RESET=config.reset,
        BLOCK=_block(dtype, 1, FORWARD_WARPS, later > 0),
    )


def backward_plan(dtype: torch.dtype, steps: int, config: DLIFConfig) -> Plan:
    """How the backward kernel is cut: the more steps are in registers, the fewer neurons."""
    first, later, segment = _cut(steps)
    in_registers = max(first, segment) if later else first
    block = _block(dtype, in_registers, BACKWARD_WARPS, later > 0)
    return _BackwardPlan(
        FIRST=first,
        LATER=later,
        SEGMENT=segment,
        RESET=config.reset,
        BLOCK=block,
        DETACH=config.detach_reset,
        SURROGATE=config.surrogate.kind,
    )


def forward(inputs: Inputs, outputs: Outputs) -> None:
    """See :class:`sj_robust.ops.dlif.operator.Implementation`."""
    M = outputs.v.numel()
    plan = forward_plan(inputs.x_seq.dtype, len(inputs.x_seq), inputs.config)
    if M > 0:
        launch(
            _kernels().dlif_forward,
            plan.programs(M),
            constants=asdict(plan),
            warps=plan.warps,
            **given(inputs),
            spike_seq=outputs.spike_seq,
            v_last=outputs.v,
            v_seq=outputs.v_seq,
            neurons=M,
        )


def backward(inputs: Inputs, grads: OutputGradients, found: InputGradients) -> None:
    """See :class:`sj_robust.ops.dlif.operator.Implementation`."""
    x_seq = inputs.x_seq
    T, M = len(x_seq), x_seq[0].numel()
    plan = backward_plan(x_seq.dtype, T, inputs.config)
    new = functools.partial(torch.empty, dtype=torch.float32, device=x_seq.device)
    partial_grad_gain = new((plan.programs(M), T))
    if M > 0:
        launch(
            _kernels().dlif_backward,
            plan.programs(M),
            constants=asdict(plan),
            warps=plan.warps,
            **given(inputs),
            grad_spike_seq=grads.spike_seq,
            grad_v_last=grads.v,
            grad_v_seq=grads.v_seq,
            grad_x_seq=found.x_seq,
            grad_v_init=found.v_init,
            partial_grad_gain=partial_grad_gain,
            # of the potential, one per segment but the first
            checkpoints=new((plan.LATER, M)) if plan.LATER else None,
            neurons=M,
            neurons_again=M,
            alpha=float(inputs.config.surrogate.alpha),
        )
    found.input_gain.copy_(partial_grad_gain.sum(0, dtype=torch.float64))


def given(inputs: Inputs) -> dict[str, Any]:
    """What every kernel of the neurons takes."""
    return {
        "x_seq": inputs.x_seq,
        "input_gain": inputs.input_gain,
        "v_init": inputs.v_init,
        **inputs.config.numbers,
    }


def launch(
    kernel: Any, programs: int, *, constants: dict[str, Any], warps: int, **arguments: Any
) -> None:
    """Launch so many programs on torch's current stream of the first tensor's device.

    Of a few variants the assembler keeps 8 bytes of a thread on its stack, where one or two
    registers less let a processor hold more threads. From its second launch on, such a variant has
    more registers and an empty stack.

    Args:
        kernel: A function of ``triton_kernel.py``.
        programs: How many.
        constants: Its compile-time arguments.
        warps: Of a program.
        arguments: Its tensors and numbers, by name; an absent tensor is None.
    """
    dtypes = {name: one.dtype for name, one in arguments.items() if isinstance(one, Tensor)}
    device = next(one.device for one in arguments.values() if isinstance(one, Tensor))
    variant = kernel, device, *constants.values(), *dtypes.items()
    on_device: AbstractContextManager[None] = nullcontext()
    if device.type == "cuda":  # on which Triton launches
        on_device = torch.cuda.device(device)
    with on_device:
        compiled = kernel[(programs,)](
            **arguments,
            **constants,
            num_warps=warps,
            enable_fp_fusion=False,
            maxnreg=_register_limits.get(variant),
        )
    if compiled is not None and compiled.n_spills:  # None in the interpreter
        _register_limits[variant] = limit_above(compiled.n_regs)


_register_limits: dict[tuple[Any, ...], int] = {}  # of a thread, by what a kernel was compiled for


def limit_above(registers: int) -> int:
    """Limit of the registers of a thread for a variant that spills with so many."""
    return min(registers + 16, 255)


def _cut(steps: int) -> tuple[int, int, int]:
    """Steps of the first segment, number of later ones, steps of each of these."""
    if steps <= LONGEST_SEQUENCE_IN_REGISTERS:
        return steps, 0, _LONG_SEGMENT
    later, first = divmod(steps - 1, _LONG_SEGMENT)
    return first + 1, later, _LONG_SEGMENT


def _block(dtype: torch.dtype, steps_in_registers: int, warps: int, is_long: bool) -> int:
    """Neurons of a program, a power of two."""
    at_once = min(_BYTES_AT_ONCE, _BYTES_PER_THREAD // steps_in_registers)
    per_thread = max(1, at_once // dtype.itemsize)
    if is_long:
        per_thread = min(per_thread, _MOST_NEURONS_OF_LONG)
    return 32 * warps << (per_thread.bit_length() - 1)


def _kernels() -> Any:
    return importlib.import_module("sj_robust.ops.dlif.triton_kernel")


@functools.cache
def _triton_reason() -> str | None:
    return import_failure(
        "Triton",
        "triton",
        _kernels,
        if_missing=", although CUDA builds of torch bring it; pip install triton",
        if_broken="install torch and the triton that it asks for again",
    )


def _is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU; False without Triton."""
    if _triton_reason() is not None:
        return False
    return not isinstance(_kernels().dlif_forward, importlib.import_module("triton").JITFunction)


_is_interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see operator.py
