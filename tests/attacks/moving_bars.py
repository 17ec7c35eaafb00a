"""Synthetic event data, bars that move in four directions, and a small spiking network for them."""

import torch
from attacks.table import PerStep, frames, seeded, train
from torch import Tensor, nn

from sj_robust import DLIFNode
from sj_robust.classifier import SpikingEventClassifier

__all__ = ["frames", "moving_bars", "spiking_model", "trained_model"]

T = 6
SIZE = 10


def moving_bars(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Binary frames [N, T, 2, H, W]: the leading edge gives ON events, the trailing OFF; 30 %
    missing, 2 % noise.
    """
    y = torch.randint(4, (count,), generator=generator)
    start = torch.randint(SIZE, (count,), generator=generator)
    frames = torch.zeros(count, T, 2, SIZE, SIZE, dtype=torch.bool)
    for sample in range(count):
        step = 1 if y[sample] % 2 == 0 else -1
        bars = frames[sample] if y[sample] < 2 else frames[sample].transpose(2, 3)
        for t in range(T):
            lead = int(start[sample]) + step * t
            bars[t, 0, lead % SIZE] = True
            bars[t, 1, (lead - 2 * step) % SIZE] = True
    seen = torch.rand(frames.shape, generator=generator) >= 0.3
    noise = torch.rand(frames.shape, generator=generator) < 0.02
    return ((frames & seen) | noise).float(), y


def spiking_model() -> SpikingEventClassifier:
    """An untrained network for the bars."""
    net = nn.Sequential(
        PerStep(nn.Conv2d(2, 8, 3, padding=1)),
        DLIFNode(T=T, tau=2.0),
        PerStep(nn.AvgPool2d(2), nn.Conv2d(8, 16, 3, padding=1)),
        DLIFNode(T=T, tau=2.0),
        PerStep(nn.Flatten(), nn.Linear(16 * 25, 32)),
        DLIFNode(T=T, tau=2.0),
        PerStep(nn.Linear(32, 4)),
    )
    return SpikingEventClassifier(net, T=T)


def trained_model(epochs: int = 8) -> SpikingEventClassifier:
    """A network that knows the directions; evaluation mode. Takes a second."""
    generator = seeded(0)
    x, y = moving_bars(600, generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spiking_model()
    return train(model, x, y, epochs=epochs, size=50, generator=generator)
