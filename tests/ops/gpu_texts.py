"""The kernels for GPUs on the table of calls, without a GPU: the Triton text in Triton's
interpreter, the CUDA text built for the CPU.

Each is a process of its own, in ``tests/``: ``TRITON_INTERPRET=1 python -m ops.gpu_texts``, which
Triton reads when it is imported, and ``python -m ops.gpu_texts LIBRARY`` with a library that was
built from :func:`text`, so that it can be one under AddressSanitizer.
"""

import contextlib
import functools
import sys
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from ops import calls, shim

from sj_robust.neuron import DLIFNode
from sj_robust.ops.dlif import cpp, cupy_launch, operator, triton_launch


class Fenced:
    """torch as the launcher sees it: new tensors are not a number until a kernel writes them, nor
    is what is beside.
    """

    FENCE = 64

    def __init__(self):
        self.buffers = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, size, *, dtype, device):
        length = torch.Size(size).numel() + 2 * self.FENCE
        self.buffers.append(torch.full((length,), torch.nan, dtype=dtype, device=device))
        return self.buffers[-1][self.FENCE : length - self.FENCE].view(size)

    def check(self):
        for buffer in self.buffers:
            beside = torch.cat((buffer[: self.FENCE], buffer[-self.FENCE :]))
            assert beside.isnan().all(), "written outside of a tensor"
        self.buffers.clear()


def run_table(backend, launcher, patch):
    """Every call of the table and what it does not hold; says what is running."""
    fence = Fenced()
    for module in (operator, launcher):
        patch.setattr(module, "torch", fence)
    table = [functools.partial(calls.check, case) for case in calls.TABLE]
    for one in (*calls.WITHOUT_TABLE, *table):
        print(one, flush=True)
        one(backend=backend)
        fence.check()
    print(f"checked {len(table)} cases")


def in_a_network(backend):
    """A neuron, step by step and in one go."""
    x = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0)) * 2
    found = []
    for name in (backend, "reference"):
        neuron = DLIFNode(3, tau=2.0, backend=name, store_v_seq=True)
        assert neuron.chosen_backend(x) == name
        (neuron(x) * x).sum().backward()
        results = [neuron.input_gain.grad, neuron.v_seq.detach()]
        neuron.reset()
        neuron.step_mode = "s"
        found.append(results + [neuron(step).detach() for step in x])
    torch.testing.assert_close(*found)
    assert operator.choose_backend("auto", x, neuron._surrogate()) != backend  # it is for tests


# ---- CuPy ----


class FakeCuPy(ModuleType):
    """``cupy`` as far as the launcher uses it; it keeps a log of devices, streams, compilations and
    launches. ``build`` makes of a text and a name what runs the kernel on the CPU.
    """

    def __init__(self, build, *, has_from_external=True):
        super().__init__("cupy")
        self.__version__ = "0"
        self.build = build
        self.log = []
        self.count = 1
        external = {}
        if has_from_external:
            external["from_external"] = lambda one: self.entered("stream", one.__cuda_stream__())
        self.cuda = SimpleNamespace(
            Device=lambda index: self.entered("device", index),
            Stream=SimpleNamespace(**external),
            ExternalStream=lambda pointer: self.entered("external", pointer),
            runtime=SimpleNamespace(getDeviceCount=lambda: self.count),
        )

    @contextlib.contextmanager
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
    """``cupy.RawKernel``."""

    def __init__(self, cupy, code, name):
        self.cupy = cupy
        self.code = code
        self.name = name

    def compile(self):
        self.cupy.log.append(("compile", self.name))
        self.run = self.cupy.build(self.code, self.name)

    def __call__(self, grid, block, arguments):
        self.cupy.log.append(("launch", self.name, grid, block))
        order = len(self.cupy.log) // 5 % 3  # of the threads, which must not matter
        self.run(*grid, *block, *arguments, order=order)


def install(fake, patch):
    """Take it for CuPy."""
    stream = SimpleNamespace(cuda_stream=0x1234)
    patch.setitem(sys.modules, "cupy", fake)
    patch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for name in ("unavailable_reason", "unsupported_reason"):
        patch.setattr(cupy_launch, name, lambda *call: None)
    for cached in (cupy_launch._compiled, cupy_launch._contexts, cupy_launch._cupy_reason):
        cached.cache_clear()
    return fake


def alone(code, name):
    """The line of a kernel under a name of its own, and that name."""
    line = code.rstrip().rpartition("\n")[2]
    own = f"{name}_{zlib.crc32(line.encode())}"
    return line.replace(name, own), own


def lines():
    """The kernels that the table asks for: a first run, where the kernel for CPUs computes."""
    found = set()

    def build(code, name):
        found.add(alone(code, name)[0])
        return lambda *call, order: None

    def also(ours, plain):
        def call(*arguments):
            ours(*arguments)
            plain(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        install(FakeCuPy(build), patch)
        for name in ("forward", "backward"):
            both = also(getattr(cupy_launch, name), getattr(cpp, name))
            patch.setattr(cupy_launch, name, both)
        with contextlib.redirect_stdout(None):
            run_table("cupy", cupy_launch, patch)
    return sorted(found)


ROUND_TRIP = """
extern "C" __global__ void round_trip(const float* from, BFloat16* bits, float* back, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        store_values(bits + i, {from[i]});
        back[i] = to_float(bits[i]);
    }
}
"""


def text():
    """The CUDA text with all of them, and rounding to bfloat16 by itself."""
    return "\n".join([cupy_launch.kernel_text(), ROUND_TRIP, *lines(), ""])


def rounds_bfloat16(library):
    """Every bfloat16, the values half-way to the next, and their neighbours: as torch does."""
    steps = torch.tensor([0, 0x7FFF, 0x8000, 0x8001])
    bits = (torch.arange(-0x8000, 0x8000)[:, None] << 16) + steps
    values = bits.to(torch.int32).view(torch.float32).flatten()
    found = np.zeros(len(values), np.uint16)
    back = np.zeros(len(values), np.float32)
    library.launch("round_trip", 1, 32, values.numpy(), found, back, np.int32(len(values)))
    calls.assert_equal(torch.from_numpy(back), values.bfloat16().float())


def main(path):
    """Run all; AssertionError with what differs."""
    with pytest.MonkeyPatch.context() as patch:
        if path is None:
            run_table("triton", triton_launch, patch)
        else:
            library = shim.Library(path)
            rounds_bfloat16(library)

            def build(code, name):
                return functools.partial(library.launch, alone(code, name)[1])

            install(FakeCuPy(build), patch)
            run_table("cupy", cupy_launch, patch)
    if path is None:
        in_a_network("triton")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
