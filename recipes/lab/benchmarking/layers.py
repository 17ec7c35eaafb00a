"""Spiking layers by name, alone and behind a batch norm: DLIF on each backend and the peers it is compared with."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust._host import functional, layer, neuron, surrogate
from sj_robust.neuron import DLIFNode, fuse
from sj_robust.ops.dlif import cpp

__all__ = ["BATCH_NORM_LAYERS", "INSTRUCTION_SETS", "LAYERS", "LayerTask"]

Layer = Callable[[Tensor], Tensor]
"""Input currents [T, N, *] to spikes [T, N, *], from a fresh state; decay 0.99, threshold 1, hard reset, triangle."""


class LayerTask:
    """Forward and backward pass of one layer over random currents.

    Args:
        method: Name of the layer, for messages.
        build: Makes the layer from the shape of its input.
        reference: Makes the layer that it must equal; None where the dynamics differ, and only the range is checked.
        shape: Shape [T, N, *] of the input currents.
        instruction_set: Instruction set that the compiled kernel uses in this task; None is the best.

    Raises:
        ImportError: If the processor or the kernel does not have the instruction set.
    """

    def __init__(
        self,
        method: str,
        build: Callable[[Sequence[int]], Layer],
        reference: Callable[[Sequence[int]], Layer] | None,
        shape: Sequence[int],
        *,
        instruction_set: str | None = None,
    ) -> None:
        """Build the layer and draw its input; see the class."""
        if instruction_set is not None and instruction_set not in cpp.instruction_sets():
            raise ImportError(f"{instruction_set} does not run here; there are {', '.join(cpp.instruction_sets())}")
        self._instruction_set = instruction_set
        self._method, self._build, self._reference = method, build, reference
        self._shape = tuple(shape)
        self._layer = build(shape)
        self._x_seq = torch.randn(self._shape).mul_(0.5).requires_grad_()
        self._grad = torch.randn(self._shape)
        self.tensor_bytes = 4 * self._x_seq.numel()
        self.inputs = [self._x_seq]

    def forward(self) -> Tensor:
        """Spikes."""
        self._x_seq.grad = None
        with _using(self._instruction_set):
            return self._layer(self._x_seq)

    def backward(self, spikes: Tensor) -> None:
        """Gradient of the input and of every parameter."""
        with _using(self._instruction_set):
            torch.autograd.backward(spikes, self._grad)

    def check(self) -> None:
        """Compare with the reference on a small input; a layer that is not right is never timed.

        Raises:
            ValueError: If spikes or gradients are wrong.
        """
        with _using(self._instruction_set):
            self._check()

    def _check(self) -> None:
        shape = (self._shape[0], 32, *(min(size, 16) for size in self._shape[2:]))
        x_seq = torch.randn(shape).mul_(0.7).requires_grad_()
        spikes = self._build(shape)(x_seq)
        if not bool(((spikes == 0) | (spikes == 1)).all()) and "ReLU" not in self._method:
            raise ValueError(f"{self._method} gives spikes that are neither 0 nor 1: it is not timed")
        if self._reference is None:
            return
        wanted_spikes = self._reference(shape)(x_seq)
        weights = torch.randn_like(x_seq)
        (grad,) = torch.autograd.grad((spikes * weights).sum(), x_seq)
        (wanted,) = torch.autograd.grad((wanted_spikes * weights).sum(), x_seq)
        # a neuron whose spikes differ by rounding at the threshold is left out; there may be one in a thousand
        same = (spikes == wanted_spikes).all(0)
        error = (grad - wanted)[:, same].norm() / wanted.norm()
        if float(same.float().mean()) < 0.999 or not float(error) < 1e-2:
            raise ValueError(f"{self._method} does not equal the textbook loop: it is not timed")


@contextmanager
def _using(instruction_set: str | None) -> Iterator[None]:
    """Compiled kernels use this instruction set; None changes nothing."""
    before = os.environ.get(cpp.INSTRUCTION_SET_VARIABLE)
    if instruction_set is not None:
        os.environ[cpp.INSTRUCTION_SET_VARIABLE] = instruction_set
    try:
        yield
    finally:
        if before is not None:
            os.environ[cpp.INSTRUCTION_SET_VARIABLE] = before
        elif instruction_set is not None:
            del os.environ[cpp.INSTRUCTION_SET_VARIABLE]


def _dlif(shape: Sequence[int], backend: str) -> Layer:
    return _with_reset(DLIFNode(shape[0], backend=backend))


def _lif(shape: Sequence[int]) -> Layer:
    return _with_reset(lif_node())


def lif_node() -> nn.Module:
    """SpikingJelly's LIFNode with the dynamics of a fresh DLIFNode."""
    triangle = surrogate.PiecewiseQuadratic(alpha=1.0)
    node: nn.Module = neuron.LIFNode(tau=100.0, decay_input=False, surrogate_function=triangle, step_mode="m")
    return node


def _parametric_lif(shape: Sequence[int]) -> Layer:
    triangle = surrogate.PiecewiseQuadratic(alpha=1.0)
    node = neuron.ParametricLIFNode(init_tau=100.0, decay_input=False, surrogate_function=triangle, step_mode="m")
    return _with_reset(node)


def _snntorch(shape: Sequence[int]) -> Layer:
    import snntorch

    leaky = snntorch.Leaky(beta=0.99, spike_grad=snntorch.surrogate.triangular(), reset_mechanism="zero")

    def layer(x_seq: Tensor) -> Tensor:
        spikes, v = [], leaky.init_leaky()
        for x in x_seq:
            spike, v = leaky(x, v)
            spikes.append(spike)
        return torch.stack(spikes)

    return layer


def _norse(shape: Sequence[int]) -> Layer:
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


def _behind_batch_norm(shape: Sequence[int], follower: Callable[[int], nn.Module], *, fused: bool = False) -> Layer:
    net = nn.Sequential(layer.BatchNorm2d(shape[2], step_mode="m"), follower(shape[0]))
    if fused:
        fuse(net)

    def run(x_seq: Tensor) -> Tensor:
        functional.reset_net(net)
        outputs: Tensor = net(x_seq)
        return outputs

    return run


def _textbook(T: int) -> nn.Module:
    return DLIFNode(T, backend="reference", step_mode="m")


def _task(method: str, build: Callable[..., Layer], reference: Callable[..., Layer] | None) -> Callable[..., LayerTask]:
    return partial(LayerTask, method, build, reference)


def _tasks(
    layers: dict[str, Callable[..., Layer]], reference: str, unlike: Sequence[str]
) -> dict[str, Callable[..., Any]]:
    return {
        method: _task(method, build, None if method in unlike else layers[reference])
        for method, build in layers.items()
    }


LAYERS = _tasks(
    {
        "DLIF cpp": partial(_dlif, backend="cpp"),
        "DLIF eager": partial(_dlif, backend="eager"),
        "textbook loop": partial(_dlif, backend="reference"),
        "SpikingJelly LIFNode": _lif,
        "SpikingJelly ParametricLIFNode": _parametric_lif,
        "snnTorch Leaky": _snntorch,
        "Norse LIFBoxCell": _norse,
    },
    "textbook loop",
    unlike=("snnTorch Leaky", "Norse LIFBoxCell"),  # they reset a step later
)
"""Tasks by the name of the layer; the textbook loop is the reference, one torch call after the other."""

INSTRUCTION_SETS = {
    name: partial(
        LayerTask,
        name,
        partial(_dlif, backend="cpp"),
        partial(_dlif, backend="reference"),
        instruction_set=name,
    )
    for name in reversed(cpp.INSTRUCTION_SETS)
}
"""The compiled kernel by its instruction set."""

BATCH_NORM_LAYERS = _tasks(
    {
        "batch norm + DLIF, one pass": partial(
            _behind_batch_norm, follower=lambda T: DLIFNode(T, backend="cpp", step_mode="m"), fused=True
        ),
        "batch norm, DLIF cpp": partial(
            _behind_batch_norm, follower=lambda T: DLIFNode(T, backend="cpp", step_mode="m")
        ),
        "batch norm, ReLU": partial(_behind_batch_norm, follower=lambda T: nn.ReLU()),
        "batch norm, LIFNode": partial(_behind_batch_norm, follower=lambda T: lif_node()),
        "batch norm, textbook loop": partial(_behind_batch_norm, follower=_textbook),
    },
    "batch norm, textbook loop",
    unlike=("batch norm, ReLU",),
)
"""Tasks by the name of the pair; the batch norm is in training mode."""
