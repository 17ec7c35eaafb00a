"""The networks of the attacks' tests as fixtures, the trained ones among them, and points around a
border.
"""

import pytest
import torch
from attacks.conftest import bars, batch, model, trained
from attacks.table import linear_model
from torch import nn

__all__ = ["bars", "batch", "digits", "model", "trained"]


@pytest.fixture
def digits():
    """Forty points of five classes around the border of a linear classifier, most of them right."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(40, 1, 6, 6, generator=generator, dtype=torch.float64)
    model = linear_model(36, torch.float64)
    y = model(x).argmax(1)
    y[::8] = (y[::8] + 1) % 5
    return model, x, y


@pytest.fixture
def margins():
    """A linear network of two pixels: an image of margin m is broken by eps > m / 2, and the last
    one is wrong.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    model[1].weight = nn.Parameter(torch.eye(2))
    half = torch.tensor([0.1, 0.3, 0.5, 0.7, -0.1]) / 2
    return (
        model,
        torch.stack((0.5 + half, 0.5 - half), 1).view(5, 1, 1, 2),
        torch.zeros(5, dtype=torch.int64),
    )
