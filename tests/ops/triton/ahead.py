"""Compiles the Triton kernels for GPUs that are not there."""

import importlib.util
import sys
from dataclasses import asdict

import torch

from sj_robust.ops import Surrogate
from sj_robust.ops.dlif import triton_launch
from sj_robust.ops.dlif.config import DLIFConfig

WIDTHS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
OF_IO = {"x_seq", "spike_seq", "grad_spike_seq", "grad_x_seq"}  # pointers to the dtype of x
SCALARS = {"decay", "leak_current", "v_threshold", "v_reset", "alpha"}
SIZES = {"neurons", "neurons_again"}  # 16 divides them, mostly
CONFIG = DLIFConfig(0.9, 1.0, 0.0, Surrogate(), False)
ABSENT = {
    "dlif_forward": ("v_init", "v_seq"),
    "dlif_backward": ("v_init", "grad_v_last", "grad_v_seq", "grad_v_init", "checkpoints"),
}
"""Tensors that a training step of a layer does not have."""


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if sys.platform != "linux" or importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def compiled(
    kernel: str,
    dtype: torch.dtype,
    steps: int,
    config: DLIFConfig,
    *,
    architecture: int = 90,
    absent: tuple[str, ...] = (),
) -> dict[str, str]:
    """Texts of ``dlif_forward`` or ``dlif_backward`` as the launcher has it, by the compiler's
    stage; ``absent`` names None pointers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    make = triton_launch.forward_plan if kernel == "dlif_forward" else triton_launch.backward_plan
    plan = make(dtype, steps, config)
    constants = {**asdict(plan), **dict.fromkeys(absent)}
    function = getattr(triton_launch._kernels(), kernel)
    signature = {name: _type(name, constants, dtype) for name in function.arg_names}
    divisible = [name for name in signature if signature[name][0] == "*" or name in SIZES]
    attributes = {
        (function.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": plan.warps, "enable_fp_fusion": False}
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=options).asm


def _type(name: str, constants: dict[str, object], dtype: torch.dtype) -> str:
    if name in constants:
        return "constexpr"
    if name in SCALARS:
        return "fp32"
    if name in SIZES:
        return "i32"
    return f"*{WIDTHS[dtype]}" if name in OF_IO else "*fp32"
