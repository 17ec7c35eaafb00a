"""Training steps of whole networks, by the name of what stands in the neuron's place (ReLU and
nothing included).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.benchmarking.layers import lif_node, lif_node_for_gpu
from lab.benchmarking.task import Task
from sj_robust.classifier import SpikingClassifier
from sj_robust.models import VGG_FEATURES, ConvChain
from sj_robust.neuron import DLIFNode, unfuse

_ARCHITECTURES: dict[str, tuple[tuple[int | Literal["A"], ...], tuple[int, ...]]] = {
    "conv4": ((32, 64, "A", 128, "A", 128, "A"), ()),
    "vgg5": (VGG_FEATURES["vgg5"], (4096, 4096)),
    "small": ((16, "A", 32, "A", 64, "A"), ()),
    "vgg11": (VGG_FEATURES["vgg11"], (4096, 4096)),
}
"""Convolutions and hidden linear layers."""

_NEURONS: dict[str, Callable[..., nn.Module]] = {
    "ReLU": nn.ReLU,
    "DLIF, one pass with batch norm": partial(DLIFNode, backend="cpp"),
    "DLIF cpp": partial(DLIFNode, backend="cpp"),
    "DLIF eager": partial(DLIFNode, backend="eager"),
    "SpikingJelly LIFNode": lif_node,
    "textbook loop": partial(DLIFNode, backend="reference"),
    "no neuron and no batch norm": nn.Identity,
}
_NO_FLOAT64 = "SpikingJelly LIFNode, GPU"  # SpikingJelly's GPU kernels know none
FUSED_AUTO = "DLIF auto, fused"
_ON_ANY_DEVICE: dict[str, Callable[..., nn.Module]] = {
    FUSED_AUTO: DLIFNode,
    "DLIF auto": DLIFNode,
    "SpikingJelly LIFNode, its choice": lif_node,
    _NO_FLOAT64: lif_node_for_gpu,
}
FUSED = "DLIF, one pass with batch norm"
_NOTHING = "no neuron and no batch norm"
_WITHOUT_SPIKES = ("ReLU", _NOTHING)


class Precision(TypedDict, total=False):
    """What the network of a training step runs in: see :class:`TrainingTask`."""

    bf16: bool
    channels_last: bool


PRECISIONS: dict[str, Precision] = {
    "": {},
    ", bf16": {"bf16": True},
    ", bf16, channels last": {"bf16": True, "channels_last": True},
}
"""Options of a training step by what they add to its name."""


def network_tasks(architecture: str) -> "dict[str, partial[NetworkTask]]":
    """Training steps on clean images by the name of the neuron; the shape is [T, N, C, H, W] of the
    images.
    """
    plain = {neuron: partial(NetworkTask, architecture, neuron) for neuron in _NEURONS}
    return plain | {
        neuron + added: partial(NetworkTask, architecture, neuron, **options)
        for neuron in (FUSED, *_WITHOUT_SPIKES)
        for added, options in PRECISIONS.items()
    }


class TrainingTask(Task):
    """What the kinds of training step share: images, labels, precision, the step of the optimizer.

    ``fused`` says whether the optimizer passes over the weights once, as the training engine's
    does. ``bf16`` runs the network under autocast in bfloat16, ``channels_last`` stores images and
    convolutions in that order.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        weight_decay: float = 0.0,
        fused: bool = False,
        bf16: bool = False,
        channels_last: bool = False,
    ) -> None:
        """Draw images of shape [T, N, C, H, W]; see the class."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        net.to(memory_format=layout)  # type: ignore[call-overload]  # torch leaves this one out
        parameters = list(net.parameters())
        self._optimizer = torch.optim.SGD(
            parameters, lr=1e-3, momentum=0.9, weight_decay=weight_decay, fused=fused
        )
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(tuple(shape[1:]), generator=generator, dtype=torch.float64, device="cpu")
        self._x = x.to(torch.get_default_device(), dtype).contiguous(memory_format=layout)
        self._y = torch.arange(shape[1]) % 10
        self._autocast = partial(torch.autocast, self._x.device.type, torch.bfloat16, enabled=bf16)
        self.tensor_bytes = 4 * self._x.numel() * shape[0]
        self.inputs = [self._x, *parameters]

    def backward(self, loss: Tensor) -> None:
        """Gradients and a step of the optimizer."""
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()


class NetworkTask(TrainingTask):
    """One training step (cross entropy, SGD) of a network of convolution - batch norm - neuron
    stages.
    """

    def __init__(
        self,
        architecture: str,
        neuron: str,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        **precision: Unpack[Precision],
    ) -> None:
        """Build the network, the same for every neuron, and draw the images."""
        self._architecture, self._neuron = architecture, neuron
        net = convolutional_network(architecture, neuron, shape).to(dtype)
        super().__init__(net, shape, dtype, **precision)
        self._classifier = SpikingClassifier(net, shape[0])

    def forward(self) -> Tensor:
        """The loss."""
        with self._autocast():
            return F.cross_entropy(self._classifier(self._x), self._y)

    def check(self) -> None:
        """Compare with the textbook loop in float64, where no spike hangs on rounding; raises
        ValueError.
        """
        if self._neuron not in (*_WITHOUT_SPIKES, _NO_FLOAT64):
            names = (self._neuron, "textbook loop")
            size = 32 if self._architecture == "vgg11" else 8  # which has five poolings
            small = (4, 2, 3, size, size)
            mine, wanted = (
                NetworkTask(self._architecture, name, small, dtype=torch.float64) for name in names
            )
            check_same_steps(self._neuron, mine, wanted)


def check_same_steps(name: str, mine: TrainingTask, wanted: TrainingTask) -> None:
    """Compare losses before and after a step, which the gradients decide.

    Raises:
        ValueError: If they differ, or the step changed nothing.
    """
    losses = []
    for task in (mine, wanted):
        loss = task.forward()
        task.backward(loss)
        losses.append([float(loss.detach()), float(task.forward().detach())])
    found, right = losses
    if (
        not all(abs(a - b) < 1e-6 * abs(b) for a, b in zip(found, right, strict=True))
        or right[0] == right[1]
    ):
        raise ValueError(
            f"{name} does not equal the textbook loop ({found} against {right}): it is not timed"
        )


def convolutional_network(architecture: str, neuron: str, shape: Sequence[int]) -> ConvChain:
    """A network by the name of its architecture and of its neuron, with the same weights for every
    neuron.
    """
    features, hidden = _ARCHITECTURES[architecture]
    torch.manual_seed(0)
    build = partial(ConvChain, features=features, hidden=hidden, batch_norm=neuron != _NOTHING)
    net = build(shape[2:], 10, T=shape[0], spiking_neuron=(_NEURONS | _ON_ANY_DEVICE)[neuron])
    if neuron not in (FUSED, FUSED_AUTO):
        unfuse(net)
    return net
