"""What masks the gradients of an honest network without making it robust."""

import copy
from collections.abc import Callable

import torch
from spikingjelly.activation_based import functional, surrogate
from torch import Tensor, nn

from sj_robust import DLIFNode


def with_neurons(model: nn.Module, what: str, value: float | nn.Module) -> nn.Module:
    """A copy in whose neurons one thing differs: another surrogate means the same answers, and
    other gradients.
    """
    functional.reset_net(model)
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, DLIFNode):
            setattr(module, what, copy.deepcopy(value))
    return copied


class Before(nn.Module):
    """A network behind a function of the images."""

    def __init__(self, function: Callable[[Tensor], Tensor], net: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.function(x))


class Astray(torch.autograd.Function):
    """The identity, its gradient turned round where ``turned`` says so."""

    @staticmethod
    def forward(ctx, x: Tensor, turned: Tensor) -> Tensor:
        ctx.save_for_backward(turned)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (turned,) = ctx.saved_tensors
        return torch.where(turned, -grad, grad), None


def clamped(x: Tensor) -> Tensor:
    """Nearly black and white: no level k/16 lies where the clamp has a slope."""
    return (100 * (x - 0.47) + 0.5).clamp(0, 1)


def stepped(x: Tensor) -> Tensor:
    """Black and white by a comparison, which cuts the graph."""
    return (x > 0.47).to(x.dtype)


def steep(x: Tensor) -> Tensor:
    """A sigmoid whose slope is tiny nearly everywhere, but seldom zero."""
    return torch.sigmoid(60 * (x - 0.47))


def turned_everywhere(x: Tensor) -> Tensor:
    return Astray.apply(x, torch.ones_like(x, dtype=torch.bool))


def turned_beside_the_levels(x: Tensor) -> Tensor:
    """Honest at the clean digits, whose pixels are multiples of 1/16, and nowhere else."""
    return Astray.apply(x, (16 * x - (16 * x).round()).abs() > 1e-4)


def shaken(x: Tensor) -> Tensor:
    return (x + 0.05 * torch.randn_like(x)).clamp(0, 1)


NARROW = surrogate.ATan(alpha=1e6)
