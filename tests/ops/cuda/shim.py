"""Builds a CUDA text for the CPU through ``cuda_shim.h`` and launches its kernels on numpy
arrays.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
KERNEL = (HERE.parents[2] / "sj_robust" / "ops" / "dlif" / "kernel.cu").read_text()
SANITIZERS = (
    "-O0",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
)
_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
    "-Wno-unused-variable",
    "-Wno-unused-parameter",
    "-Wno-clobbered",
    "-fno-gnu-unique",  # else all libraries of a process share the static variables of the first
)
_HALVES = """
inline float half_to_float(Half a) { return (float)shim::as_bits<_Float16>(a.bits); }
inline Half float_to_half(float value) { return {shim::as_bits<unsigned short>((_Float16)value)}; }
"""
_ENTRY = """
extern "C" int launch_{0}(unsigned grid, unsigned threads, unsigned seed, void** arguments) {{
    return shim::launch({0}, grid, threads, seed, arguments);
}}
extern "C" const char* signature_{0}() {{ return shim::signature({0}); }}
"""
_ERRORS = {
    1: "divergent barrier: some threads never reached it",
    2: "shuffle with a mask or a block that does not name whole warps",
}
_SIZES = {"p": 8, "q": 8, "i": 4, "f": 4}


def missing_tool() -> str | None:
    """Why nothing can be built here, or None."""
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: the CUDA text cannot be built for the CPU"
    return None


def build(text: str, directory: Path, *, sanitize: bool = False, optimise: bool = True) -> Path:
    """Shared library with an entry for every ``extern "C"`` kernel and DLIF_... line of the
    text.
    """
    names = re.findall(r"^\s*DLIF_(?:FORWARD|BACKWARD)\((\w+)", text, re.M)
    names += re.findall(r'^extern "C" __global__ void (\w+)', text, re.M)
    source = directory / "kernels.cpp"
    library = directory / ("sanitized.so" if sanitize else "kernels.so")
    parts = [f'#include "{HERE / "cuda_shim.h"}"', '#line 1 "kernel.cu"', text]
    if "struct Half" in text:
        parts.append(_HALVES)
    source.write_text("\n".join([*parts, *(_ENTRY.format(name) for name in names)]))
    options = ["-O1" if optimise else "-O0", *(SANITIZERS if sanitize else ())]
    command = ["g++", *_FLAGS, *options, str(source), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"g++ refuses the CUDA text:\n{result.stderr[:4000]}")
    return library


class Library:
    """The kernels of a library made by :func:`build`."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._shared = _shared_variables(path)

    @functools.cache  # noqa: B019  # a library lives as long as the tests
    def signature(self, name: str) -> str:
        """One letter per parameter: p pointer, q 64-bit, i 32-bit integer, f float."""
        function = self._library[f"signature_{name}"]
        function.restype = ctypes.c_char_p
        return function().decode()

    def launch(self, name: str, grid: int, threads: int, *arguments, order: int = 0) -> None:
        """Run a kernel; arguments are arrays, None (null), addresses, or numpy scalars of the exact
        size.
        """
        signature = self.signature(name)
        if len(arguments) != len(signature):
            raise TypeError(f"{name} takes {len(signature)} arguments, got {len(arguments)}")
        pairs = zip(arguments, signature, strict=True)
        values = [
            _scalar(argument, letter, f"argument {i} of {name}")
            for i, (argument, letter) in enumerate(pairs)
        ]
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        for variable, size in self._shared:
            address = ctypes.addressof((ctypes.c_char * size).in_dll(self._library, variable))
            ctypes.memset(address, 0xFF, size)  # NaN
        status = self._library[f"launch_{name}"](grid, threads, order, addresses)
        if status:
            raise RuntimeError(_ERRORS[status])


def sanitizer_runtime() -> str | None:
    """What has to be loaded before Python for a library with AddressSanitizer, or None if g++ lacks
    it.
    """
    paths = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return " ".join(paths) if all(Path(path).is_absolute() for path in paths) else None


def run_sanitized(command: list[str], preload: str) -> subprocess.CompletedProcess[str]:
    """Run a command in which a library built with ``sanitize=True`` may be loaded."""
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    environment["PYTHONPATH"] = str(HERE.parents[1])
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def _scalar(argument, letter: str, what: str) -> np.ndarray:
    """The value of one kernel parameter, in memory."""
    if argument is None or isinstance(argument, np.ndarray):
        address = 0 if argument is None else argument.ctypes.data
        argument = np.int64(address)
    elif isinstance(argument, int) and letter == "p":
        argument = np.int64(argument)
    if not isinstance(argument, np.generic) or argument.itemsize != _SIZES[letter]:
        raise TypeError(f"{what} must be {_SIZES[letter]} bytes wide ({letter}), got {argument!r}")
    if (argument.dtype.kind == "f") != (letter == "f"):
        raise TypeError(f"{what} must be of kind {letter}, got {argument.dtype}")
    return np.asarray(argument)


def _shared_variables(path: Path) -> list[tuple[str, int]]:
    """Names and sizes of the static variables that stand for shared memory."""
    listing = subprocess.run(
        ["nm", "-D", "-S", str(path)], capture_output=True, text=True, check=True
    ).stdout
    fields = [line.split() for line in listing.splitlines()]
    return [
        (f[3], int(f[1], 16))
        for f in fields
        if len(f) == 4 and f[3].startswith("_ZZ") and "backward" in f[3]
    ]
