"""Compiles the Triton kernels for GPUs that are not there, and reads their machine code."""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sj_robust.ops import Surrogate
from sj_robust.ops.dlif import triton_launch
from sj_robust.ops.dlif.config import DLIFConfig

WIDTHS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
OF_IO = {"x_seq", "spike_seq", "grad_spike_seq", "grad_x_seq"}  # pointers to the dtype of x
SCALARS = {"decay", "leak_current", "v_threshold", "v_reset", "alpha"}
SIZES = {"neurons", "neurons_again"}  # 16 divides them, mostly
CONFIG = DLIFConfig(0.9, 1.0, 0.0, Surrogate(), False)


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if sys.platform != "linux" or importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None if _tool("cuobjdump").exists() else "this Triton comes without cuobjdump"


@dataclass(frozen=True)
class Code:
    """One kernel as machine code: per thread its registers and stack, how much of what it executes,
    and its PTX.
    """

    registers: int
    stack: int
    instructions: int
    neurons_per_thread: int
    loads: Counter[int]  # of global memory in the unrolled text, by bits
    stores: Counter[int]
    barriers: int
    ptx: str
    ir: str  # Triton's, where there is one


def triton_code(
    kernel: str,
    dtype: torch.dtype,
    steps: int,
    config: DLIFConfig = CONFIG,
    *,
    architecture: int = 90,
    absent: tuple[str, ...] = (),
    aligned: bool = True,
) -> Code:
    """The kernel ``dlif_forward`` or ``dlif_backward`` as the launcher has it; ``absent`` names
    None pointers.
    """
    make = triton_launch.forward_plan if kernel == "dlif_forward" else triton_launch.backward_plan
    plan = make(dtype, steps, config)
    constants = {**asdict(plan), **dict.fromkeys(absent)}
    function = getattr(triton_launch._kernels(), kernel)
    return _compiled(function, constants, plan.warps, plan.BLOCK, dtype, architecture, aligned)


def _compiled(
    function: Any,
    constants: dict[str, Any],
    warps: int,
    neurons: int,
    dtype: torch.dtype,
    architecture: int,
    aligned: bool,
) -> Code:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: _type(name, constants, dtype) for name in function.arg_names}
    if aligned:
        divisible = [name for name in signature if signature[name][0] == "*" or name in SIZES]
    else:
        divisible = []
    attributes = {
        (function.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": False, "maxnreg": None}
    while True:  # as the launcher does from one launch to the next
        compiled = triton.compile(
            source, target=GPUTarget("cuda", architecture, 32), options=options
        )
        code = read(
            compiled.asm["cubin"],
            neurons // (32 * warps),
            compiled.asm["ptx"],
            compiled.asm["ttir"],
        )
        if not code.stack or options["maxnreg"] == 255:
            return code
        options["maxnreg"] = triton_launch.limit_above(code.registers)


def read(binary: bytes, neurons_per_thread: int, ptx: str, ir: str = "") -> Code:
    """What a cubin says of its one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = _run("cuobjdump", "-res-usage", str(path))
        text = _run("nvdisasm", "-c", "-ndf", str(path))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # behind the last EXIT the code loops on the spot and is filled up
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", text, re.M)
    lines = [line for line in lines if not re.match(r"(NOP|BRA `?\(?\.L_x_\d+\)?$)", line)]
    names = [re.sub(r"^@!?U?P\w+ ", "", line).split()[0] for line in lines]
    return Code(
        registers,
        stack,
        len(names),
        neurons_per_thread,
        Counter(_bits(name) for name in names if name.startswith("LDG")),
        Counter(_bits(name) for name in names if name.startswith("STG")),
        sum(name.startswith("BAR") for name in names),
        ptx,
        ir,
    )


def _bits(name: str) -> int:
    width = re.search(r"\.(?:[US])?(8|16|64|128)(?:\.|$)", name)
    return int(width[1]) if width else 32


def _type(name: str, constants: dict[str, object], dtype: torch.dtype) -> str:
    if name in constants:
        return "constexpr"
    if name in SCALARS:
        return "fp32"
    if name in SIZES:
        return "i32"
    if name in OF_IO:
        return f"*{WIDTHS[dtype]}"
    return "*fp32"


def _tool(name: str) -> Path:
    found = importlib.util.find_spec("triton")
    return Path(found.origin).parent / "backends" / "nvidia" / "bin" / name


def _run(name: str, *arguments: str) -> str:
    result = subprocess.run([_tool(name), *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


ABSENT = {
    "dlif_forward": ("v_init", "v_seq"),
    "dlif_backward": ("v_init", "grad_v_last", "grad_v_seq", "grad_v_init", "checkpoints"),
}
"""Tensors that a training step of a layer does not have."""
