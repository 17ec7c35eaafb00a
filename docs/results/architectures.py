r"""Two small networks for the digits that the package does not have: with residual sums, and with
max pooling.

python recipes/sweep.py --base digits --options '{mode: at, reference: false}' --grid \
    '{"model,T": [[small, 8], ["docs/results/architectures.py:residual", 4],
    ["docs/results/architectures.py:max_pooling", 4]], rho: [0.0, 1.0]}' \
    --evaluate gradient standard --evaluation-options \
    '{test_limit: 128, control: false, trust_code: true}' \
    --output runs/digits_architectures_sweep

trains them, with and without MS-MPPD, and attacks them.
"""

from collections.abc import Callable

from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

__all__ = ["max_pooling", "residual"]

NewNeuron = Callable[[], nn.Module]


def spiking_layer(channels_in: int, channels_out: int, spiking_neuron: NewNeuron) -> nn.Sequential:
    """Convolution, batch norm and neuron."""
    return nn.Sequential(
        layer.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        layer.BatchNorm2d(channels_out),
        spiking_neuron(),
    )


class Block(nn.Module):
    """Spikes plus those of two layers."""

    def __init__(self, channels: int, spiking_neuron: NewNeuron):
        super().__init__()
        self.branch = nn.Sequential(
            spiking_layer(channels, channels, spiking_neuron),
            spiking_layer(channels, channels, spiking_neuron),
        )

    def forward(self, x_seq: Tensor) -> Tensor:
        """From [T, N, C, H, W] to the same shape."""
        sums: Tensor = x_seq + self.branch(x_seq)
        return sums


def residual(
    image_shape: tuple[int, int, int], classes: int, spiking_neuron: NewNeuron
) -> nn.Sequential:
    """One layer, two residual blocks of 16 and 32 channels, average of each channel."""
    return in_many_steps(
        spiking_layer(image_shape[0], 16, spiking_neuron),
        Block(16, spiking_neuron),
        layer.AvgPool2d(2),
        spiking_layer(16, 32, spiking_neuron),
        Block(32, spiking_neuron),
        layer.AdaptiveAvgPool2d(1),
        layer.Flatten(),
        layer.Linear(32, classes),
    )


def max_pooling(
    image_shape: tuple[int, int, int], classes: int, spiking_neuron: NewNeuron
) -> nn.Sequential:
    """Two layers of 16 and 32 channels, each with a max pooling of its spikes."""
    height, width = image_shape[1] // 4, image_shape[2] // 4
    return in_many_steps(
        spiking_layer(image_shape[0], 16, spiking_neuron),
        layer.MaxPool2d(2),
        spiking_layer(16, 32, spiking_neuron),
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(32 * height * width, classes),
    )


def in_many_steps(*layers: nn.Module) -> nn.Sequential:
    """The layers in multi-step mode, from [T, N, C, H, W] to [T, N, classes]."""
    net = nn.Sequential(*layers)
    functional.set_step_mode(net, "m")
    return net
