"""What compiles kernels for GPUs that are not there: NVRTC of the PyPI package, and Triton ahead of
time.
"""

import ctypes
import functools
import importlib.util
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from sj_robust.ops.dlif import triton_launch


def compile_text(text, architecture, *options, ptx=False):
    """Binary (or PTX) and log.

    Raises:
        RuntimeError: With NVRTC's log, if the text does not compile.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    # the options that the launcher passes and the one that CuPy adds
    arguments = ["--std=c++17", "-ftz=true", f"--gpu-architecture={architecture}", *options]
    array = (ctypes.c_char_p * len(arguments))(*(argument.encode() for argument in arguments))
    status = nvrtc.nvrtcCompileProgram(program, len(arguments), array)
    log = _read(program, "ProgramLog").decode()
    try:
        if status:
            raise RuntimeError(f"NVRTC refuses the text for {architecture}:\n{log[:4000]}")
        return _read(program, "PTX" if ptx else "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def resources(log):
    """Registers and bytes of spilled registers of every kernel, from the log of
    ``--ptxas-options=-v``.
    """
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return {
        name: (int(used), int(spilled)) for name, spilled, used in re.findall(pattern, log, re.S)
    }


def _read(program, what):
    nvrtc = _nvrtc()
    size = ctypes.c_size_t()
    nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(size.value, 1))
    nvrtc[f"nvrtcGet{what}"](program, buffer)
    text = buffer.raw[: size.value]
    return text if what == "CUBIN" else text.rstrip(b"\0")


@functools.cache
def _nvrtc():
    return ctypes.CDLL(str(_library_path()))


@functools.cache
def _library_path():
    try:
        package = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:  # no package "nvidia" at all
        return None
    locations = [] if package is None else list(package.submodule_search_locations or ())
    found = [path for location in locations for path in Path(location).glob("lib/libnvrtc.so.*")]
    return next(
        (path for path in found if "builtins" not in path.name and "alt" not in path.name), None
    )


# markers of tests
needs_nvrtc = pytest.mark.skipif(
    sys.platform != "linux" or _library_path() is None,
    reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc-cu12)",
)
needs_triton = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (pip install triton)",
)

# ---- Triton ----

WIDTHS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
OF_IO = {"x_seq", "spike_seq", "grad_spike_seq", "grad_x_seq"}  # pointers to the dtype of x
SCALARS = {"decay", "leak_current", "v_threshold", "v_reset", "alpha"}
SIZES = {"neurons", "neurons_again"}  # 16 divides them, mostly


def compiled(
    kernel,
    dtype,
    steps,
    config,
    *,
    architecture=90,
    absent=(),
):
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


def _type(name, constants, dtype):
    if name in constants:
        return "constexpr"
    if name in SCALARS:
        return "fp32"
    if name in SIZES:
        return "i32"
    return f"*{WIDTHS[dtype]}" if name in OF_IO else "*fp32"
