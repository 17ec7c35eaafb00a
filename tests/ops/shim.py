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
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
)
_FLAGS = (
    "-std=c++17",
    "-O0",
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
_TYPES = {"p": np.int64, "q": np.int64, "i": np.int32, "f": np.float32}


def missing_tool():
    """Why nothing can be built here, or None."""
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: the CUDA text cannot be built for the CPU"
    return None


def build(text, directory, *, sanitize=False):
    """Shared library with an entry for every ``extern "C"`` kernel and DLIF_... line of the
    text.
    """
    names = re.findall(r"^\s*DLIF_(?:FORWARD|BACKWARD)\((\w+)", text, re.M)
    names += re.findall(r'^extern "C" __global__ void (\w+)', text, re.M)
    source = directory / "kernels.cpp"
    library = directory / "kernels.so"
    parts = [f'#include "{HERE / "cuda_shim.h"}"', '#line 1 "kernel.cu"', text]
    if "struct Half" in text:
        parts.append(_HALVES)
    source.write_text("\n".join([*parts, *(_ENTRY.format(name) for name in names)]))
    flags = [*_FLAGS, *SANITIZERS] if sanitize else _FLAGS
    command = ["g++", *flags, str(source), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"g++ refuses the CUDA text:\n{result.stderr[:4000]}")
    return library


class Library:
    """The kernels of a library made by :func:`build`."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        self._shared = _shared_variables(path)

    @functools.cache  # noqa: B019  # a library lives as long as the tests
    def signature(self, name):
        """One letter per parameter: p pointer, q 64-bit, i 32-bit integer, f float."""
        function = self._library[f"signature_{name}"]
        function.restype = ctypes.c_char_p
        return function().decode()

    def launch(self, name, grid, threads, *arguments, order=0):
        """Run a kernel; arguments are arrays, or numpy scalars of the exact type."""
        values = []
        for argument, letter in zip(arguments, self.signature(name), strict=True):
            value = argument.ctypes.data if isinstance(argument, np.ndarray) else argument
            value = np.int64(value) if isinstance(argument, np.ndarray) else value
            if type(value) is not _TYPES[letter]:
                raise TypeError(f"argument {len(values)} of {name} must be {letter}, got {value!r}")
            values.append(np.asarray(value))
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        for variable, size in self._shared:
            address = ctypes.addressof((ctypes.c_char * size).in_dll(self._library, variable))
            ctypes.memset(address, 0xFF, size)  # NaN
        status = self._library[f"launch_{name}"](grid, threads, order, addresses)
        if status:
            raise RuntimeError(_ERRORS[status])


def run_sanitized(command):
    """Run a command in which a library built with ``sanitize=True`` may be loaded; g++ says what
    has to be loaded before Python.
    """
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        asked = ["g++", f"-print-file-name={name}"]
        found = subprocess.run(asked, capture_output=True, text=True, check=True)
        paths.append(found.stdout.strip())
    assert all(map(os.path.isabs, paths)), "g++ has no AddressSanitizer runtime: install libasan"
    environment = {**os.environ, "LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}
    environment["PYTHONPATH"] = f"{HERE.parent}:{HERE.parents[1]}"
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def _shared_variables(path):
    """Names and sizes of the static variables that stand for shared memory."""
    command = ["nm", "-D", "-S", str(path)]
    environment = {**os.environ, "LD_PRELOAD": ""}
    listing = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = re.findall(r"^\w+ (\w+) \w (_ZZ\S*backward\S*)$", listing.stdout, re.M)
    return [(name, int(size, 16)) for size, name in found]
