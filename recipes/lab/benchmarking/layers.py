"""Spiking layers, alone, behind a batch norm and before a pooling: DLIF and its peers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sj_robust.core.host import functional, layer, neuron, surrogate
from sj_robust.neuron import DLIFNode, fuse
from sj_robust.ops.dlif import operator

Shape = Sequence[int]
"""[T, N, *] of a layer's input currents, [T, N, C, H, W] of images that are shown for T steps."""


class Task:
    """One method at one shape, ready to run.

    Attributes:
        has_one_graph: Whether the forward pass builds a single graph, so that the memory it saves
            for the backward pass can be measured; an attack in it builds several.
        inputs: Tensors that are there before the forward pass.
    """

    has_one_graph: ClassVar[bool] = False
    inputs: list[Tensor]

    def forward(self) -> Any:
        """Forward pass; the result keeps the graph alive."""
        raise NotImplementedError

    def backward(self, result: Any) -> None:
        """Backward pass from the result of :meth:`forward`, and the step of the optimizer; nothing
        if the method has neither.
        """

    def check(self) -> None:
        """Raise ValueError if the results differ from those of a reference; nothing if there is no
        reference.
        """


Run = Callable[[Tensor], Tensor]
"""Input currents [T, N, *] to spikes [T, N, *]."""


def require(backend: str) -> None:
    """Refuse a backend that is not installed or finds no device.

    Raises:
        ImportError: With what is missing.
    """
    reason = operator.unavailable_reason(backend)
    if reason is not None:
        raise ImportError(reason)


def dlif(T: int, backend: str) -> nn.Module:
    """A fresh DLIFNode: decay 0.99, threshold 1, hard reset, triangle."""
    require(backend)
    return DLIFNode(T, backend=backend, step_mode="m")


def lif_node(T: int) -> nn.Module:
    """SpikingJelly's LIFNode with the dynamics of a fresh DLIFNode."""
    return _of_the_host(neuron.LIFNode, tau=100.0)


def lif_node_for_gpu(T: int) -> nn.Module:
    """The same on SpikingJelly 0.0.0.0.14's CuPy backend; 2.x chooses by an environment
    variable.
    """
    node: Any = lif_node(T)
    if "cupy" in getattr(node, "supported_backends", ()):  # 2.x's neurons have no backend
        node.backend = "cupy"
    return node  # type: ignore[no-any-return]  # a module


def parametric_lif_node(T: int) -> nn.Module:
    """SpikingJelly's ParametricLIFNode, whose decay learns."""
    return _of_the_host(neuron.ParametricLIFNode, init_tau=100.0)


def _of_the_host(kind: Any, **tau: float) -> nn.Module:
    node: nn.Module = kind(
        decay_input=False,
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        step_mode="m",
        **tau,
    )
    return node


def relu(T: int) -> nn.Module:
    """What a spiking layer would cost if it were free."""
    return nn.ReLU()


def snntorch_leaky(T: int) -> Run:
    """The neuron of snnTorch with the same constants; it resets a step later."""
    import snntorch

    leaky = snntorch.Leaky(
        beta=0.99,
        spike_grad=snntorch.surrogate.triangular(),
        reset_mechanism="zero",
    )
    return partial(_step_by_step, leaky, leaky.init_leaky)


def norse_cell(T: int) -> Run:
    """That of Norse likewise; at a step of 1 ms a rate of 10 / s keeps 0.99 of the potential."""
    from norse.torch import LIFBoxCell, LIFBoxParameters

    parameters = LIFBoxParameters(
        tau_mem_inv=torch.tensor(10.0),
        method="triangle",
        alpha=torch.tensor(1.0),
    )
    return partial(_step_by_step, LIFBoxCell(p=parameters), lambda: None)


def _step_by_step(cell: Any, first_state: Callable[[], Any], x_seq: Tensor) -> Tensor:
    spikes, state = [], first_state()
    for x in x_seq:
        spike, state = cell(x, state)
        spikes.append(spike)
    return torch.stack(spikes)


textbook_loop = partial(dlif, backend="reference")
"""Makes the definition of correct: one torch call after the other."""


def in_one_pass(net: nn.Module) -> nn.Module:
    """The network whose batch norm, DLIF neurons and pooling run in one pass."""
    fuse(net)
    return net


@dataclass(frozen=True)
class Layer:
    """A layer; calling it with the shape [T, N, *] of its input makes its task.

    Attributes:
        node: Makes the neuron from the number of steps.
        norm: Whether a batch norm in training mode stands before it.
        pools: Whether a 2x2 average pooling stands behind it.
        one_pass: Whether these are one operator, which does not round between them.
        dtype: What the currents are stored in.
        channels_last: Whether every step is stored channels last.
        check: What is looked at before it is timed: that it equals the textbook loop, only that
            spikes are 0 or 1, or nothing.
    """

    node: Callable[[int], Run]
    norm: bool = False
    pools: bool = False
    one_pass: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    check: Literal["equal", "spikes", "nothing"] = "equal"

    def __call__(self, shape: Shape) -> "LayerTask":
        """The task at a shape."""
        return LayerTask(self, shape)

    def textbook(self) -> "Layer":
        """The layer that it must equal: it rounds where this one does."""
        dtype = torch.float32 if self.one_pass else self.dtype
        return replace(self, node=textbook_loop, one_pass=False, dtype=dtype)

    def built(self, shape: Shape) -> Run:
        """Runs the layer from a fresh state."""
        node = self.node(shape[0])
        if not isinstance(node, nn.Module):
            return node
        net = nn.Sequential()
        if self.norm:
            net.append(layer.BatchNorm2d(shape[2], step_mode="m"))
        net.append(node)
        if self.pools:
            net.append(layer.AvgPool2d(2, step_mode="m"))
        return partial(_from_reset, in_one_pass(net) if self.one_pass else net)

    def stored(self, currents: Tensor) -> Tensor:
        """Currents [T, N, *] as the layer gets them, a leaf of the graph."""
        currents = currents.to(self.dtype)
        if self.channels_last:
            images = currents.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            currents = images.view(currents.shape)
        return currents.detach().requires_grad_()


def _from_reset(net: nn.Module, x_seq: Tensor) -> Tensor:
    functional.reset_net(net)
    outputs: Tensor = net(x_seq)
    return outputs


class LayerTask(Task):
    """Forward and backward pass of one layer over random currents."""

    has_one_graph = True

    def __init__(self, layer: Layer, shape: Shape) -> None:
        """Build the layer and draw its input."""
        self._layer = layer
        self._shape = shape
        self._run = layer.built(shape)
        self._x_seq = layer.stored(torch.randn(*shape).mul_(0.5))
        with torch.no_grad():
            self._grad = torch.randn_like(self._run(self._x_seq))
        self.inputs = [self._x_seq]

    def forward(self) -> Tensor:
        """Spikes."""
        self._x_seq.grad = None
        return self._run(self._x_seq)

    def backward(self, spikes: Tensor) -> None:
        """Gradient of the input and of every parameter."""
        torch.autograd.backward(spikes, self._grad)

    def check(self) -> None:
        """Compare with the textbook loop on a small input; raises ValueError."""
        layer = self._layer
        if layer.check == "nothing":
            return
        T, _, *sizes = self._shape
        shape = (T, 32, *(min(size, 16) for size in sizes))
        x_seq = layer.stored(torch.randn(shape).mul_(0.7))
        spikes = layer.built(shape)(x_seq)
        whole = spikes * 4 if layer.pools else spikes
        if not torch.equal(whole, whole.round()) or spikes.min() < 0 or spikes.max() > 1:
            raise ValueError("spikes are neither 0 nor 1: it is not timed")
        if layer.check == "spikes":
            return
        textbook = layer.textbook()
        exact = textbook.stored(x_seq)
        wanted_spikes = textbook.built(shape)(exact)
        weights = torch.randn_like(spikes)
        (grad,) = torch.autograd.grad(spikes, x_seq, weights)
        (wanted,) = torch.autograd.grad(wanted_spikes, exact, weights.to(exact.dtype))
        # a neuron whose spikes differ by rounding at the threshold is skipped: one in a thousand
        same = (spikes == wanted_spikes).all(0)
        if layer.pools:
            same = same.repeat_interleave(2, -1).repeat_interleave(2, -2)
        wanted = wanted.float()
        error = (grad.float() - wanted)[:, same].norm() / wanted.norm()
        if same.float().mean() < 0.999 or not error < 1e-2:
            raise ValueError("it does not equal the textbook loop: it is not timed")
