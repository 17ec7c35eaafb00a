"""Names of backends and the modules behind them."""

from typing import Any, Protocol

from torch import Tensor

from sj_robust.ops.dlif import cpp, cupy_launch, eager
from sj_robust.ops.dlif.config import Inputs, OutputGradients, Outputs

__all__ = ["KERNELS", "Implementation", "implementation", "unavailable_reason"]

KERNELS: dict[str, Any] = {"cpp": cpp, "cupy": cupy_launch}
"""Backends that read memory themselves, so that no tracer of torch can see into them."""


class Implementation(Protocol):
    """What a backend provides, for contiguous tensors [T, M] and [M]."""

    def forward(self, inputs: Inputs, store_v_seq: bool) -> Outputs:
        """Spikes, last potential, and potentials after reset if asked for."""

    def backward(
        self, inputs: Inputs, grads: OutputGradients, needs_v_init: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of ``x_seq``, ``input_gain`` and, if needed, ``v_init``."""


def implementation(name: str, threads_per_block: int | None = None) -> Any:
    """The :class:`Implementation` of a name; only ``"cupy"`` reads the block size."""
    if name == "cupy" and threads_per_block is not None:
        return cupy_launch.Launcher(threads_per_block=threads_per_block)
    return KERNELS.get(name, eager)


def unavailable_reason(name: str) -> str | None:
    """What keeps a backend from running on this machine, or None."""
    reason: str | None = KERNELS[name].unavailable_reason() if name in KERNELS else None
    return reason


# As torch.compiler.assume_constant_result does, which loads the compiler: it need not look into this function.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
