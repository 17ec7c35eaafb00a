"""Training steps of whole networks, by the name of the neuron, or of what stands in its place (ReLU
or nothing).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.benchmarking.layers import (
    Shape,
    Task,
    dlif,
    lif_node,
    lif_node_for_gpu,
    relu,
    textbook_loop,
)
from sj_robust.classifier import SpikingClassifier
from sj_robust.models import ConvChain
from sj_robust.models.chain import VGG_FEATURES
from sj_robust.neuron import DLIFNode, unfuse

FEATURES = VGG_FEATURES | {
    "conv4": (32, 64, "A", 128, "A", 128, "A"),
}
"""Channels of the convolutions, and poolings, by the name of a network."""

FUSED = "DLIF, one pass with batch norm"
NOTHING = "no neuron and no batch norm"
LIF_ON_GPU = "SpikingJelly LIFNode, GPU"
NEURONS: dict[str, Callable[..., nn.Module]] = {
    "ReLU": relu,
    FUSED: partial(dlif, backend="cpp"),
    "DLIF cpp": partial(dlif, backend="cpp"),
    "DLIF eager": partial(dlif, backend="eager"),
    "SpikingJelly LIFNode": lif_node,
    "textbook loop": textbook_loop,
    NOTHING: nn.Identity,
    "DLIF auto": DLIFNode,
    LIF_ON_GPU: lif_node_for_gpu,
}
"""What makes a neuron, by the name of the method."""


@dataclass(frozen=True)
class Precision:
    """Precision and memory format of a network.

    Attributes:
        dtype: Dtype of its weights.
        bf16: Whether it runs under autocast in bfloat16.
        channels_last: Whether images and convolutions are channels last.
    """

    dtype: torch.dtype = torch.float32
    bf16: bool = False
    channels_last: bool = False


EXACT = Precision(torch.float64)
"""Precision of checks: no spike depends on rounding."""
PRECISIONS = {
    "": Precision(),
    ", bf16": Precision(bf16=True),
    ", bf16, channels last": Precision(bf16=True, channels_last=True),
}
"""Precisions by what they add to the name of a method."""


class TrainingTask(Task):
    """A training step: network, images, labels and optimizer; a subclass has the loss."""

    def __init__(
        self,
        net: nn.Module,
        shape: Shape,
        precision: Precision,
        *,
        weight_decay: float = 0.0,
        one_pass: bool = False,
    ) -> None:
        """Draw images of shape [T, N, C, H, W]; ``one_pass`` is the optimizer's over the weights,
        as in the training engine.
        """
        layout = torch.channels_last if precision.channels_last else torch.contiguous_format
        self.net = net.to(precision.dtype)
        net.to(memory_format=layout)  # type: ignore[call-overload]  # torch leaves this one out
        parameters = list(net.parameters())
        self._optimizer = torch.optim.SGD(
            parameters, lr=1e-3, momentum=0.9, weight_decay=weight_decay, fused=one_pass
        )
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(
            tuple(shape[1:]),
            generator=generator,
            dtype=torch.float64,
            device="cpu",
        )
        device = torch.get_default_device()
        self.x = x.to(device, precision.dtype).contiguous(memory_format=layout)
        self.y = torch.arange(shape[1]) % 10
        self.autocast = partial(
            torch.autocast,
            device.type,
            torch.bfloat16,
            enabled=precision.bf16,
        )
        self.inputs = [self.x, *parameters]

    def backward(self, loss: Tensor) -> None:
        """Gradients and a step of the optimizer."""
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()


class NetworkTask(TrainingTask):
    """One training step (cross entropy, SGD) of a network of convolution - batch norm - neuron
    stages.
    """

    has_one_graph = True

    def __init__(self, architecture: str, neuron: str, precision: Precision, shape: Shape) -> None:
        """Build the network, the same for every neuron, and draw the images."""
        self._architecture = architecture
        self._neuron = neuron
        net = convolutional_network(architecture, neuron, shape)
        super().__init__(net, shape, precision)
        self._classifier = SpikingClassifier(self.net, shape[0])

    def forward(self) -> Tensor:
        """The loss."""
        with self.autocast():
            return F.cross_entropy(self._classifier(self.x), self.y)

    def check(self) -> None:
        """Compare with the textbook loop in float64; raises ValueError.

        Nothing is compared for what is not a spiking neuron, and for SpikingJelly's kernels for a
        GPU, which have no float64.
        """
        if self._neuron in ("ReLU", NOTHING, LIF_ON_GPU):
            return
        side = 32 if self._architecture == "vgg11" else 8  # its five poolings need 32 pixels
        make = partial(
            NetworkTask,
            self._architecture,
            precision=EXACT,
            shape=(4, 2, 3, side, side),
        )
        check_same_steps(make(self._neuron), make("textbook loop"))


def check_same_steps(mine: TrainingTask, wanted: TrainingTask) -> None:
    """Compare the losses before and after a step; the one after it depends on all gradients.

    Raises:
        ValueError: If they differ, or the step changed nothing.
    """
    found = _losses(mine)
    right = _losses(wanted)
    changed = right[0] != right[1]
    if not changed or not torch.allclose(found, right, rtol=1e-6, atol=0.0):
        raise ValueError(
            "it does not equal the textbook loop, losses before and after a step are "
            f"{found.tolist()} against {right.tolist()}: it is not timed"
        )


def _losses(task: TrainingTask) -> Tensor:
    """Losses before and after a step, [2]."""
    loss = task.forward()
    task.backward(loss)
    return torch.stack([loss, task.forward()]).detach()


def convolutional_network(architecture: str, neuron: str, shape: Shape) -> nn.Module:
    """A network for images of shape [T, N, C, H, W], with the same weights for every neuron."""
    torch.manual_seed(0)
    net = ConvChain(
        shape[2:],
        10,
        T=shape[0],
        spiking_neuron=NEURONS[neuron],
        features=FEATURES[architecture],
        hidden=(4096, 4096) if architecture in VGG_FEATURES else (),
        batch_norm=neuron != NOTHING,
    )
    if neuron != FUSED:
        unfuse(net)
    return net
