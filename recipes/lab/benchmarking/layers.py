"""Spiking layers by name, alone, behind a batch norm and before a pooling: DLIF and the peers it is
compared with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lab.benchmarking.task import Task
from sj_robust._host import functional, layer, neuron, surrogate
from sj_robust.neuron import DLIFNode, fuse
from sj_robust.ops.dlif import cpp

Layer = Callable[[Tensor], Tensor]
"""Input currents [T, N, *] to spikes [T, N, *], from a fresh state; decay 0.99, threshold 1, hard
reset, triangle.
"""
Build = Callable[[Sequence[int]], Layer]
"""Makes a layer from the shape of its input."""


@dataclass(eq=False)
class LayerTask(Task):
    """Forward and backward pass of one layer over random currents.

    Attributes:
        method: Name of the layer, for messages.
        build: Makes the layer.
        reference: Makes the layer that it must equal; None where the dynamics differ, and only the
            range is checked.
        shape: Shape [T, N, *] of the input currents.
        dtype: What the currents are stored in; ``tensor_bytes`` is that of float32 in any case.
        channels_last: Whether every step is stored channels last.
        pools: Whether the layer averages over 2x2 neurons.
        rounds: Whether the reference gets the currents as they are stored, since the layer rounds
            between its parts as the reference does; otherwise in float32.
    """

    method: str
    build: Build
    reference: Build | None
    shape: Sequence[int]
    _: KW_ONLY
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    pools: bool = False
    rounds: bool = False

    def __post_init__(self) -> None:
        """Build the layer and draw its input."""
        self._layer = self.build(self.shape)
        self._x_seq = self._stored(torch.randn(*self.shape).mul_(0.5)).requires_grad_()
        side = 2 if self.pools else 1
        self._grad = self._stored(
            torch.randn(*self.shape[:3], *(size // side for size in self.shape[3:]))
        )
        self.tensor_bytes = 4 * self._x_seq.numel()
        self.inputs = [self._x_seq]

    def _stored(self, values: Tensor) -> Tensor:
        if not self.channels_last:
            return values.to(self.dtype)
        return (
            values.to(self.dtype)
            .flatten(0, 1)
            .contiguous(memory_format=torch.channels_last)
            .view(values.shape)
        )

    def forward(self) -> Tensor:
        """Spikes."""
        self._x_seq.grad = None
        return self._layer(self._x_seq)

    def backward(self, spikes: Tensor) -> None:
        """Gradient of the input and of every parameter."""
        torch.autograd.backward(spikes, self._grad)

    def check(self) -> None:
        """Compare with the reference on a small input; a layer that is not right is never timed.

        Raises:
            ValueError: If spikes or gradients are wrong.
        """
        shape = (self.shape[0], 32, *(min(size, 16) for size in self.shape[2:]))
        x_seq = self._stored(torch.randn(shape).mul_(0.7)).requires_grad_()
        spikes = self.build(shape)(x_seq)
        whole = spikes * 4 if self.pools else spikes
        if (
            not bool(((whole == whole.round()) & (spikes >= 0) & (spikes <= 1)).all())
            and "ReLU" not in self.method
        ):
            raise ValueError(
                f"{self.method} gives spikes that are neither 0 nor 1: it is not timed"
            )
        if self.reference is None:
            return
        exact = x_seq.detach().to(self.dtype if self.rounds else torch.float32).requires_grad_()
        wanted_spikes = self.reference(shape)(exact)
        weights = torch.randn_like(spikes)
        (grad,) = torch.autograd.grad(spikes, x_seq, weights)
        (wanted,) = torch.autograd.grad(wanted_spikes, exact, weights.to(exact.dtype))
        # a neuron whose spikes differ by rounding at the threshold is left out; there may be one in
        # a thousand
        same = (spikes == wanted_spikes).all(0)
        if self.pools:
            same = same.repeat_interleave(2, -1).repeat_interleave(2, -2)
        error = (grad.float() - wanted.float())[:, same].norm() / wanted.float().norm()
        if float(same.float().mean()) < 0.999 or not float(error) < 1e-2:
            raise ValueError(f"{self.method} does not equal the textbook loop: it is not timed")


def _of_the_host(kind: Any, **tau: float) -> nn.Module:
    """A neuron of SpikingJelly with the dynamics of a fresh DLIFNode, whatever the number of
    steps.
    """
    triangle = surrogate.PiecewiseQuadratic(alpha=1.0)
    node: nn.Module = kind(decay_input=False, surrogate_function=triangle, step_mode="m", **tau)
    return node


def lif_node(T: int = 0) -> nn.Module:
    """SpikingJelly's LIFNode."""
    return _of_the_host(neuron.LIFNode, tau=100.0)


def lif_node_for_gpu(T: int = 0) -> nn.Module:
    """The same on SpikingJelly 0.0.0.0.14's CuPy backend; 2.x chooses by an environment
    variable.
    """
    node: Any = lif_node()
    if "cupy" in getattr(node, "supported_backends", ()):
        node.backend = "cupy"
    return node  # type: ignore[no-any-return]  # 2.x's neurons have no backend


def dlif(T: int, backend: str) -> nn.Module:
    """A fresh DLIFNode."""
    return DLIFNode(T, backend=backend, step_mode="m")


def alone(node: Callable[[int], nn.Module]) -> Build:
    """The layer of one neuron per input."""
    return lambda shape: _from_reset(node(shape[0]))


def behind_batch_norm(
    node: Callable[[int], nn.Module], *, pools: bool = False, fused: bool = False
) -> Build:
    """The neuron behind a batch norm in training mode, and before a 2x2 average pooling if it
    ``pools``.
    """

    def build(shape: Sequence[int]) -> Layer:
        pooling = [layer.AvgPool2d(2, step_mode="m")] if pools else []
        net = nn.Sequential(layer.BatchNorm2d(shape[2], step_mode="m"), node(shape[0]), *pooling)
        if fused:
            fuse(net)
        return _from_reset(net)

    return build


def _from_reset(net: nn.Module) -> Layer:
    def run(x_seq: Tensor) -> Tensor:
        functional.reset_net(net)
        outputs: Tensor = net(x_seq)
        return outputs

    return run


def _snntorch(shape: Sequence[int]) -> Layer:
    import snntorch

    leaky = snntorch.Leaky(
        beta=0.99, spike_grad=snntorch.surrogate.triangular(), reset_mechanism="zero"
    )
    return _step_by_step(leaky, leaky.init_leaky)


def _norse(shape: Sequence[int]) -> Layer:
    from norse.torch import LIFBoxCell, LIFBoxParameters

    decay_per_step = torch.tensor(10.0)  # (1 / s): with a step of 1 ms the potential keeps 0.99
    cell = LIFBoxCell(
        p=LIFBoxParameters(tau_mem_inv=decay_per_step, method="triangle", alpha=torch.tensor(1.0))
    )
    return _step_by_step(cell, lambda: None)


def _step_by_step(
    cell: Callable[[Tensor, Any], tuple[Tensor, Any]], first_state: Callable[[], Any]
) -> Layer:
    def run(x_seq: Tensor) -> Tensor:
        spikes, state = [], first_state()
        for x in x_seq:
            spike, state = cell(x, state)
            spikes.append(spike)
        return torch.stack(spikes)

    return run


def _on_instruction_set(name: str, shape: Sequence[int]) -> LayerTask:
    if name not in cpp.instruction_sets():
        raise ImportError(
            f"{name} does not run here; there are {', '.join(cpp.instruction_sets())}"
        )
    kernel, reference = (alone(partial(dlif, backend=backend)) for backend in ("cpp", "reference"))
    return LayerTask(name, kernel, reference, shape)


def _tasks(
    layers: Mapping[str, Build], reference: str, unlike: Sequence[str]
) -> dict[str, Callable[..., LayerTask]]:
    return {
        method: partial(LayerTask, method, build, None if method in unlike else layers[reference])
        for method, build in layers.items()
    }


LAYERS = _tasks(
    {
        "DLIF cpp": alone(partial(dlif, backend="cpp")),
        "DLIF eager": alone(partial(dlif, backend="eager")),
        "textbook loop": alone(partial(dlif, backend="reference")),
        "SpikingJelly LIFNode": alone(lif_node),
        "SpikingJelly ParametricLIFNode": alone(
            lambda T: _of_the_host(neuron.ParametricLIFNode, init_tau=100.0)
        ),
        "snnTorch Leaky": _snntorch,
        "Norse LIFBoxCell": _norse,
    },
    "textbook loop",
    unlike=("snnTorch Leaky", "Norse LIFBoxCell"),  # they reset a step later
)
"""Tasks by the name of the layer; the textbook loop is the reference, one torch call after the
other.
"""

INSTRUCTION_SETS = {
    name: partial(_on_instruction_set, name) for name in reversed(cpp.INSTRUCTION_SETS)
}
"""The compiled kernel by the instruction set that the environment has to name."""

BATCH_NORM_LAYERS = _tasks(
    {
        "batch norm + DLIF, one pass": behind_batch_norm(partial(dlif, backend="cpp"), fused=True),
        "batch norm, DLIF cpp": behind_batch_norm(partial(dlif, backend="cpp")),
        "batch norm, ReLU": behind_batch_norm(lambda T: nn.ReLU()),
        "batch norm, LIFNode": behind_batch_norm(lif_node),
        "batch norm, textbook loop": behind_batch_norm(partial(dlif, backend="reference")),
    },
    "batch norm, textbook loop",
    unlike=("batch norm, ReLU",),
)
"""Tasks by the name of the pair; the batch norm is in training mode."""

_TEXTBOOK_STAGE = behind_batch_norm(partial(dlif, backend="reference"), pools=True)
_STAGES = {
    "batch norm + DLIF + pooling, one pass": behind_batch_norm(
        partial(dlif, backend="cpp"), pools=True, fused=True
    ),
    "batch norm, ReLU, pooling": behind_batch_norm(lambda T: nn.ReLU(), pools=True),
    "batch norm, LIFNode, pooling": behind_batch_norm(lif_node, pools=True),
    "batch norm, textbook loop, pooling": _TEXTBOOK_STAGE,
}
_STORED: dict[str, Any] = {
    "": {},
    ", channels last": {"channels_last": True},
    ", bf16": {"dtype": torch.bfloat16},
    ", bf16, channels last": {"dtype": torch.bfloat16, "channels_last": True},
}


STAGES = {
    name + how: partial(
        LayerTask, name, build, None if "ReLU" in name else _TEXTBOOK_STAGE, pools=True, **options
    )
    for name, build in _STAGES.items()
    for how, options in _STORED.items()
    if not how or "one pass" in name or "ReLU" in name
}
"""Tasks by the name of the stage and how its currents are stored, float32 and channels first where
nothing is said; the batch norm is in training mode."""
