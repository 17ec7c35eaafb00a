"""NVRTC of the PyPI package, which compiles CUDA for any architecture on a machine without a GPU or
driver.
"""

import ctypes
import functools
import importlib.util
import re
import sys
from pathlib import Path


def missing() -> str | None:
    """Why NVRTC cannot be used here, or None."""
    if sys.platform != "linux":
        return "NVRTC's package is only for Linux here"
    return (
        None if _library_path() else "NVRTC is not installed (pip install nvidia-cuda-nvrtc-cu12)"
    )


def compile_text(
    text: str, architecture: str, *options: str, ptx: bool = False
) -> tuple[bytes, str]:
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


def resources(log: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of spilled registers of every kernel, from the log of
    ``--ptxas-options=-v``.
    """
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return {
        name: (int(used), int(spilled)) for name, spilled, used in re.findall(pattern, log, re.S)
    }


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    nvrtc = _nvrtc()
    size = ctypes.c_size_t()
    nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(size.value, 1))
    nvrtc[f"nvrtcGet{what}"](program, buffer)
    text = buffer.raw[: size.value]
    return text if what == "CUBIN" else text.rstrip(b"\0")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    return ctypes.CDLL(str(_library_path()))


@functools.cache
def _library_path() -> Path | None:
    try:
        package = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:  # no package "nvidia" at all
        return None
    locations = [] if package is None else list(package.submodule_search_locations or ())
    found = [path for location in locations for path in Path(location).glob("lib/libnvrtc.so.*")]
    return next(
        (path for path in found if "builtins" not in path.name and "alt" not in path.name), None
    )
