"""Synthetic event data, bars that move in four directions, a small spiking network for them, and
the event attacks.
"""

from functools import partial

import torch
from attacks.table import PerStep, seeded, train
from torch import Tensor, nn

from sj_robust import DLIFNode
from sj_robust.attacks import flip_events, move_events, random_flips, random_moves
from sj_robust.classifier import SpikingEventClassifier

T = 6
SIZE = 10


def moved(attack, *arguments, flips, **options):
    """An attack in time with half as many moves: two elements differ for each."""
    moves = flips // 2 if isinstance(flips, int) and flips > 1 else flips
    return attack(*arguments, moves=moves, **options)


EVENT_ATTACKS = {
    "default": flip_events,
    "add": partial(flip_events, allow="add"),
    "remove": partial(flip_events, allow="remove"),
    "gradient_only": partial(flip_events, probes=0, queries=0),
    "one_step": partial(flip_events, steps=1, probes=0, queries=5),
    "last": partial(flip_events, keep_best=False, reduce=False, queries=3),
    "targets_and_restarts": partial(
        flip_events,
        target_classes=2,
        restarts=3,
        probes=2,
        queries=3,
    ),
    "eot": partial(
        flip_events,
        eot_samples=2,
        confidence=0.5,
        probes=2,
        queries=3,
    ),
    "moves": partial(moved, move_events),
    "moves_targets_and_restarts": partial(
        moved, move_events, total_shift=4, target_classes=2, restarts=3, probes=2, queries=3
    ),
    "random": random_flips,
    "random_moves": partial(moved, random_moves, total_shift=9, tries=3),
    "random_add": partial(random_flips, allow="add", tries=3),
    "random_remove": partial(random_flips, allow="remove", tries=3),
}


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


def frames(
    *shape: int, seed: int = 0, share: float = 0.3, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Frames of independent events."""
    return (torch.rand(shape, generator=seeded(seed)) < share).to(dtype)
