"""A small Spikformer for images: one convolution makes the patches, SpikingJelly's blocks follow.

It needs SpikingJelly 2.0 or newer.
"""

from collections.abc import Callable
from typing import Any

from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

try:
    from spikingjelly.activation_based.model.spikformer import SpikformerBlock
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Spikformer comes with SpikingJelly 2.0 or newer: pip install 'spikingjelly>=2.0'"
    ) from error

__all__ = ["SmallSpikformer", "build"]


class SmallSpikformer(nn.Module):
    """Patches of 4 x 4 pixels that overlap by half, blocks of attention, and logits of all tokens.

    Args:
        spiking_neuron: Builds one neuron.
        image_shape: (C, H, W) of one image.
        classes: Number of classes.
        dims: Channels of a token.
        heads: Heads of the attention.
        blocks: Number of blocks.
    """

    def __init__(
        self,
        spiking_neuron: Callable[[], nn.Module],
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        dims: int = 32,
        heads: int = 4,
        blocks: int = 1,
    ) -> None:
        """See the class."""
        super().__init__()
        channels, height, width = image_shape
        tokens = (height // 2) * (width // 2)
        self.patches = layer.Conv2d(channels, dims, 4, stride=2, padding=1)
        self.neuron = spiking_neuron()

        def neuron(**_: Any) -> nn.Module:
            return spiking_neuron()

        built = []
        for _ in range(blocks):
            block = SpikformerBlock(dims, num_heads=heads, mlp_ratio=2, spiking_neuron=neuron)
            built.append(block)
        self.blocks = nn.Sequential(*built)
        self.head = layer.Linear(tokens * dims, classes)
        functional.set_step_mode(self, "m")

    def forward(self, x_seq: Tensor) -> Tensor:
        """Logits [T, N, classes] of a sequence [T, N, C, H, W]."""
        spikes = self.neuron(self.patches(x_seq))
        logits: Tensor = self.head(self.blocks(spikes).flatten(2))
        return logits


def build(
    spiking_neuron: Callable[[], nn.Module],
    image_shape: tuple[int, int, int],
    classes: int,
    **options: Any,
) -> SmallSpikformer:
    """The network, as ``--model`` takes it."""
    return SmallSpikformer(spiking_neuron, image_shape, classes, **options)
