"""Operations that are no affine maps, on values [T, N, 4, 6], and boxes of such values."""

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import layer, neuron
from torch import nn

SAMPLES = 3
SHAPE = (2, SAMPLES, 4, 6)
generator = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(6, 5, generator=generator)
KERNEL = torch.randn(4, 3, 3, generator=generator)
SCALES = torch.randn(2, 6, generator=generator)
CHANNELS = torch.randn(2, 4, generator=generator)


def halves(x):
    return x[..., :3], x[..., 3:]


def product(x):
    a, b = halves(x)
    return a * b


def attention(x):
    q, k = halves(x)
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ x


def linear_attention(x):
    """Of values >= 0, as spikes are."""
    q, k = halves(x.abs())
    return (q @ (k.transpose(-1, -2) @ k)) * 0.125


def with_constants(x):
    product = x @ WEIGHT
    return torch.cat([product, WEIGHT.T[:, :4] @ x], -2) if x.ndim < 3 else product


def time_mixed(x):
    weight = torch.tensor([[0.5, -2.0], [1.5, 0.25]])
    shift = torch.tensor([[0.1], [-0.2]])
    return torch.addmm(shift, weight, x.flatten(1)).view(x.shape)


def folded(function):
    """A function of [T * N, 4, 6]."""
    return lambda x: function(x.flatten(0, 1)).unflatten(0, (2, -1))


def masked(x):
    return torch.where(x > 0.2, x * 2.0, x - 1.0)


def gate(x):
    a, b = halves(x)
    return torch.where(a >= b, a, b) * a.sigmoid()


def beside_what_is_rounded(x):
    """Its second part is exact to what float32 keeps of 300."""
    a, b = halves(x)
    return a + ((b + 300.0) - 300.0)


def in_two_layouts(x):
    return folded(torch.relu)(torch.relu(x) - 0.2)


def iand(x):
    a, b = halves((x > 0).float())
    return (1.0 - a) * b


OPERATIONS = {
    "product": product,
    "square as a product": lambda x: x * x,
    "matrix product": lambda x: x @ x.transpose(-1, -2),
    "matrix product with a constant": with_constants,
    "attention": attention,
    "attention without softmax": linear_attention,
    "a map over time": time_mixed,
    "softmax over channels": lambda x: torch.softmax(5.0 * x, 2),
    "maximum along a dimension": lambda x: x.max(dim=2).values,
    "minimum along a dimension": lambda x: x.amin(3, keepdim=True),
    "maximum of two": lambda x: torch.maximum(*halves(x)),
    "minimum with a constant": lambda x: torch.minimum(x, torch.tensor(0.3)),
    "choice": masked,
    "gate": gate,
    "iand": iand,
    "sum of what is exact and what is rounded": beside_what_is_rounded,
    "functions of [T, N, *] and [T * N, *]": in_two_layouts,
    "comparison": lambda x: (x[..., :3] <= x[..., 3:]).to(x),
    "layer norm": lambda x: F.layer_norm(x, (6,), *SCALES),
    "layer norm of two dimensions": lambda x: F.layer_norm(x, (4, 6)),
    "group norm": folded(lambda x: F.group_norm(x, 2, *CHANNELS)),
    "transposed convolution": folded(lambda x: F.conv_transpose1d(x, KERNEL, CHANNELS[0, :3])),
    "transposed convolution with stride": folded(
        lambda x: F.conv_transpose1d(x, KERNEL, None, stride=2, padding=1, output_padding=1)
    ),
    "reflection": folded(lambda x: F.pad(x, (2, 1), mode="reflect") * 3.0),
    "circle": folded(lambda x: F.pad(x, (2, 1), mode="circular") - 1.0),
    "replication": folded(lambda x: F.pad(x, (2, 1), mode="replicate") + 1.0),
    "zeros": folded(lambda x: F.pad(x, (2, 1)) + 1.0),
    "relu": torch.relu,
    "relu6": lambda x: F.relu6(4.0 * x),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "hardtanh": F.hardtanh,
    "leaky relu": F.leaky_relu,
    "sigmoid": lambda x: torch.sigmoid(6.0 * x),
    "tanh": torch.tanh,
    "exp": lambda x: torch.exp(0.3 * x),
    "elu": F.elu,
    "softplus": lambda x: F.softplus(12.0 * x),
    "abs": torch.abs,
    "square": torch.square,
    "silu": lambda x: F.silu(3.0 * x),
    "gelu": lambda x: F.gelu(2.0 * x),
}
"""Functions of values [T, N, 4, 6]: most of their results begin a leaf, some are affine."""


class Function(nn.Module):
    """An operation of the table as a part of a network."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return OPERATIONS[self.name](x)


class Behind(nn.Module):
    """An operation on images as [T, N, 4, 6], then neurons and logits."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation
        width = operation(torch.rand(SHAPE)).flatten(2).shape[2]
        self.first = layer.Linear(width, 16)
        self.first.weight.data *= 3
        self.node = neuron.LIFNode(step_mode="m")
        self.last = layer.Linear(16, 3)

    def forward(self, x):
        x = self.operation(x.squeeze(2)).flatten(2)
        return self.last(self.node(self.first(x)))


def box(radius, *, scale=1.0, seed=0):
    """A box of float32 values: its lower and upper ends."""
    drawn = torch.Generator().manual_seed(seed)
    centre = scale * torch.randn(SHAPE, generator=drawn)
    widths = radius * torch.rand(SHAPE, generator=drawn)
    widths = widths * (torch.rand(SHAPE, generator=drawn) < 0.8)
    return centre - widths, centre + widths
