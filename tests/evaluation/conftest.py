"""The networks of the attacks' tests as fixtures, the trained one among them, and points around a border."""

import pytest
import torch
from attacks.conftest import batch, model, trained
from attacks.table import linear_model

__all__ = ["batch", "digits", "model", "trained"]


@pytest.fixture
def digits():
    """Forty points of five classes around the border of a linear classifier, most of them right."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(40, 1, 6, 6, generator=generator, dtype=torch.float64)
    model = linear_model(36, torch.float64)
    y = model(x).argmax(1)
    y[::8] = (y[::8] + 1) % 5
    return model, x, y
