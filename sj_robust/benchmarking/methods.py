"""Spiking layers by name: DLIF on each backend and the peers it is compared with."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sj_robust._host import neuron, surrogate
from sj_robust.neuron import DLIFNode

__all__ = ["METHODS", "build"]

Layer = Callable[[Tensor], Tensor]
"""Input currents [T, N, *] to spikes [T, N, *], from a fresh state."""


def build(method: str, T: int) -> Layer:
    """The layer of that name with decay 0.99, threshold 1, hard reset and a triangular surrogate.

    Args:
        method: One of :data:`METHODS`.
        T: Number of time steps.

    Raises:
        ImportError: If the peer is not installed.
        RuntimeError: If the backend is not available.

    Example:
        >>> build("DLIF eager", T=2)(torch.ones(2, 1)).tolist()
        [[1.0], [1.0]]
    """
    return METHODS[method](T)


def _dlif(T: int, backend: str) -> Layer:
    return _with_reset(DLIFNode(T, backend=backend))


def _lif(T: int) -> Layer:
    triangle = surrogate.PiecewiseQuadratic(alpha=1.0)
    return _with_reset(neuron.LIFNode(tau=100.0, decay_input=False, surrogate_function=triangle, step_mode="m"))


def _parametric_lif(T: int) -> Layer:
    triangle = surrogate.PiecewiseQuadratic(alpha=1.0)
    node = neuron.ParametricLIFNode(init_tau=100.0, decay_input=False, surrogate_function=triangle, step_mode="m")
    return _with_reset(node)


def _snntorch(T: int) -> Layer:
    import snntorch

    leaky = snntorch.Leaky(beta=0.99, spike_grad=snntorch.surrogate.triangular(), reset_mechanism="zero")

    def layer(x_seq: Tensor) -> Tensor:
        spikes, v = [], leaky.init_leaky()
        for x in x_seq:
            spike, v = leaky(x, v)
            spikes.append(spike)
        return torch.stack(spikes)

    return layer


def _norse(T: int) -> Layer:
    from norse.torch import LIFBoxCell, LIFBoxParameters

    decay_per_step = torch.tensor(10.0)  # (1 / s): with a step of 1 ms the potential keeps 0.99
    cell = LIFBoxCell(p=LIFBoxParameters(tau_mem_inv=decay_per_step, method="triangle", alpha=torch.tensor(1.0)))

    def layer(x_seq: Tensor) -> Tensor:
        spikes, state = [], None
        for x in x_seq:
            spike, state = cell(x, state)
            spikes.append(spike)
        return torch.stack(spikes)

    return layer


def _with_reset(node: nn.Module) -> Layer:
    def layer(x_seq: Tensor) -> Tensor:
        node.reset()  # type: ignore[operator]  # every SpikingJelly neuron has it
        spikes: Tensor = node(x_seq)
        return spikes

    return layer


METHODS: dict[str, Callable[[int], Layer]] = {
    "DLIF cpp": partial(_dlif, backend="cpp"),
    "DLIF eager": partial(_dlif, backend="eager"),
    "textbook loop": partial(_dlif, backend="reference"),
    "SpikingJelly LIFNode": _lif,
    "SpikingJelly ParametricLIFNode": _parametric_lif,
    "snnTorch Leaky": _snntorch,
    "Norse LIFBoxCell": _norse,
}
"""Layer factories by name; the textbook loop is the reference, one torch call after the other."""
