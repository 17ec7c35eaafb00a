"""Host time of a call of the CUDA kernels: everything around a launch, with a CuPy that launches
nothing.

``python -m ops.cuda.host_time`` in ``tests/`` prints CPU microseconds of the launchers alone, of a
forward and a backward pass of a ``DLIFNode``, autograd included, and what torch itself takes for a
function of as many arguments. The tensors are small and on the CPU.
"""

import sys
import time
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from sj_robust.neuron import DLIFNode
from sj_robust.ops.dlif import cupy_launch
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients
from sj_robust.ops.surrogate import Surrogate

T, NEURONS = 4, 256  # small: the tensors themselves cost nothing


class NoKernel:
    """``cupy.RawKernel`` as far as the launcher uses it."""

    def __init__(self, code: str, name: str, options: tuple[str, ...] = ()) -> None:
        self.code, self.name = code, name

    def compile(self) -> None:
        """Nothing to do."""

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]
    ) -> None:
        """Nothing runs."""


class Nothing(torch.autograd.Function):
    """Takes and gives what DLIF does."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Any, ...]:
        """Outputs of the right shape."""
        ctx.save_for_backward(*arguments[:3])
        ctx.set_materialize_grads(False)
        return torch.empty_like(arguments[0]), torch.empty_like(arguments[0][0]), None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Gradients of the right shape."""
        x, gain, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(gain), *[None] * 5


def install() -> None:
    """A CuPy without kernels, for this process."""
    cupy: Any = ModuleType("cupy")
    cupy.RawKernel = NoKernel
    cupy.cuda = SimpleNamespace(
        Device=lambda index: nullcontext(),
        Stream=SimpleNamespace(from_external=lambda stream: nullcontext()),
        runtime=SimpleNamespace(getDeviceCount=lambda: 1),
    )
    sys.modules["cupy"] = cupy
    no_stream = SimpleNamespace(cuda_stream=0)  # no GPU here
    torch.cuda.current_stream = lambda device: no_stream  # type: ignore[assignment]
    cupy_launch.no_gpu_reason = lambda: None
    cupy_launch.unsupported_reason = lambda *arguments: None  # tensors of the CPU


def microseconds(call: Any, repeats: int = 300, rounds: int = 15) -> float:
    """CPU time of one call, the least of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeats):
            call()
        best = min(best, (time.process_time() - start) / repeats)
    return 1e6 * best


def main() -> None:
    """Print the figures."""
    torch.set_num_threads(1)
    install()
    config = DLIFConfig(0.9, 1.0, 0.0, Surrogate(), False)
    x, gain = torch.zeros(T, NEURONS), torch.ones(T)
    inputs, grads = Inputs(x, gain, None, config), OutputGradients(torch.ones_like(x))
    print(f"forward   {microseconds(lambda: cupy_launch.forward(inputs, False)):6.1f} us")
    print(f"backward  {microseconds(lambda: cupy_launch.backward(inputs, grads, False)):6.1f} us")
    node, leaf, ones = (
        DLIFNode(T, backend="cupy", step_mode="m"),
        x.clone().requires_grad_(),
        torch.ones_like(x),
    )

    def step() -> None:
        node.time_step, node.v = 0, 0.0  # a reset
        torch.autograd.grad(node.multi_step_forward(leaf), (leaf, node.input_gain), ones)

    def floor() -> None:
        # torch's
        spikes, _, _ = Nothing.apply(  # type: ignore[no-untyped-call]
            leaf, node.input_gain, None, *range(4)
        )
        torch.autograd.grad(spikes, (leaf, node.input_gain), ones)

    print(f"neuron    {microseconds(step):6.1f} us")
    print(f"of torch  {microseconds(floor):6.1f} us")


if __name__ == "__main__":
    main()
