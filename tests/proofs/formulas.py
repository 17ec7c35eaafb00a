"""Networks whose forward is written out in a test, and how many of their images are proved, none of
which may be broken.
"""

import itertools

import torch
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.core.threat import linf_bounds
from sj_robust.proofs import verify
from sj_robust.proofs.program import Record
from sj_robust.proofs.values import bounds_of


def linear(weight, bias=None):
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data[:] = torch.tensor(weight)
    if bias is not None:
        layer.bias.data[:] = torch.tensor(bias)
    return layer


class Formula(nn.Module):
    """A network whose forward is a function of its parts and the input."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.formula = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.formula(self, x)


def on_bounds(function, x, dtype=torch.float64):
    """Bounds of a function of bounds, which takes tensors of a dtype."""
    program = Record(x.centre.to(dtype), {}).program(function, nn.Identity())

    def apply(operation, args, kwargs):
        return bounds_of(operation.func, *args, **kwargs)

    return program.run(x, apply)


def formula(forward, *, T=1, **parts):
    return SpikingClassifier(Formula(forward, **parts), T=T).eval()


def broken(model, x, y, eps, *, points=2000):
    """Which images have a misclassified point among corners and random points of their balls."""
    generator = torch.Generator().manual_seed(0)
    low, high = linf_bounds(x, eps=eps)
    share = torch.rand(points, *x.shape[1:], generator=generator)
    share[::2] = share[::2].round()
    if x[0].numel() <= 8:
        corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=x[0].numel())))
        share = torch.cat([share, corners.view(-1, *x.shape[1:])])
    found = []
    for bottom, top, label in zip(low, high, y, strict=True):
        drawn = (bottom + share * (top - bottom)).clamp(bottom, top)
        with torch.no_grad():
            found.append(bool((model(drawn).argmax(1) != label).any()))
    return found


def count_proofs(model, x, eps, **given):
    """How many images are verified, after a check that none of them can be broken."""
    y = model(x).argmax(1).detach()
    verified = verify(model, x, y, eps, **given).verified
    both = [
        proved and wrong for proved, wrong in zip(verified, broken(model, x, y, eps), strict=True)
    ]
    assert not any(both), f"verified, and yet broken: {both}"
    return sum(verified)
