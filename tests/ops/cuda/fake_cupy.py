"""``cupy`` as far as the launcher uses it: its kernels are the CUDA text, run on the CPU.

It passes arguments as CuPy does, by width, refuses what CuPy would silently misread, and keeps a
log of devices, streams, compilations and launches.
"""

import sys
import zlib
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch
from ops.cuda import shim

from sj_robust.ops.dlif import cupy_launch, operator


class FakeCuPy(ModuleType):
    """Every kernel is built when it is compiled, or comes from ``library``, which holds them all.

    With ``collect`` nothing is built and nothing runs: ``lines`` are the kernels asked for.
    """

    def __init__(self, folder, *, library=None, collect=False, has_from_external=True):
        super().__init__("cupy")
        self.__version__ = "0"
        self.folder = folder
        self.library = library
        self.collect = collect
        self.log = []
        self.lines = set()
        self.count = 1

        class Stream:
            pass

        if has_from_external:
            Stream.from_external = lambda foreign: self.entered("stream", foreign.__cuda_stream__())
        self.cuda = SimpleNamespace(
            Device=lambda index: self.entered("device", index),
            Stream=Stream,
            ExternalStream=lambda pointer: self.entered("external", pointer),
            runtime=SimpleNamespace(getDeviceCount=lambda: self.count),
        )

    @contextmanager
    def entered(self, *what):
        self.log.append(("enter", *what))
        try:
            yield
        finally:
            self.log.append(("exit", *what))

    def RawKernel(self, code, name, options=()):
        assert options == ("--std=c++17",)
        return Kernel(self, code, name)


class Kernel:
    """``cupy.RawKernel``; its name in a library of many tells its variant."""

    def __init__(self, cupy, code, name):
        self.cupy = cupy
        self.code = code
        self.name = name
        self.line = code.rstrip().rpartition("\n")[2]
        self.alone = f"{name}_{zlib.crc32(self.line.encode())}"

    def compile(self):
        self.cupy.log.append(("compile", self.name))
        self.cupy.lines.add(self.line.replace(self.name, self.alone))
        self.library = self.cupy.library
        if self.library is None and not self.cupy.collect:
            folder = self.cupy.folder / str(len(self.cupy.log))
            folder.mkdir()
            self.library = shim.Library(shim.build(self.code, folder))
            self.alone = self.name

    def __call__(self, grid, block, arguments):
        self.cupy.log.append(("launch", self.name, grid, block))
        if not self.cupy.collect:  # the order of the threads must not matter
            order = len(self.cupy.log) // 5 % 3
            self.library.launch(self.alone, *grid, *block, *arguments, order=order)


def install(fake, patch):
    """Take it for CuPy; ``patch`` is pytest's MonkeyPatch."""
    stream = SimpleNamespace(cuda_stream=0x1234)
    patch.setitem(sys.modules, "cupy", fake)
    patch.setattr(torch.cuda, "current_stream", lambda device: stream)
    patch.setattr(cupy_launch, "_TEXTS_TRIED", {})
    patch.setattr(operator, "choose_backend", lambda backend, *call: backend)
    for cached in (cupy_launch._compiled, cupy_launch._contexts, cupy_launch._cupy_reason):
        cached.cache_clear()
    return fake
