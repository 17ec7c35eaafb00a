"""Balls around frames of events and all frames of each, one by one: what proofs of events are held
against.
"""

from dataclasses import dataclass
from itertools import product

import torch
from proofs.networks import in_steps
from spikingjelly.activation_based import layer, neuron
from torch import Tensor

from sj_robust import DLIFNode
from sj_robust.attacks import ThreatModel
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.proofs.changes import Flips
from sj_robust.proofs.moves import Events, MovedEvents
from sj_robust.proofs.rules import Bounds

T = 3
SHAPE = (T, 2, 3, 3)
"""Of the frames of one sample."""


def frames(*shape, seed=0, most=1):
    """Numbers of events from 0 to ``most``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(most + 1, shape, generator=generator).double()


def all_changed(x: Tensor, most: int, *, binary: bool = True) -> Tensor:
    """A sample with every set of at most so many events added and removed, [sets, *]."""
    found = {tuple(x.flatten().tolist())}
    for _ in range(most):
        longer = set(found)
        for values in found:
            for place, value in enumerate(values):
                for after in (value - 1.0, value + 1.0):
                    if after < 0 or (binary and after > 1):
                        continue
                    longer.add((*values[:place], after, *values[place + 1 :]))
        found = longer
    return torch.tensor(sorted(found), dtype=x.dtype).view(-1, *x.shape)


def lines_reached(line: Tensor, moves: int, shift: int, *, binary: bool) -> dict[tuple, int]:
    """Lines [T] that so many moves by so many frames make of one, with the fewest moves of each.

    Every event is given a frame by itself, so that nothing is known of gains or matchings here.
    """
    T = len(line)
    events = [t for t in range(T) for _ in range(int(line[t]))]
    near = [range(max(0, t - shift), min(T, t + shift + 1)) for t in events]
    found: dict[tuple, int] = {}
    for frames in product(*near):
        number = sum(a != b for a, b in zip(events, frames, strict=True))
        after = [frames.count(t) for t in range(T)]
        if number > moves or (binary and max(after) > 1):
            continue
        found[tuple(after)] = min(number, found.get(tuple(after), number))
    return found


def all_moved(x: Tensor, moves: int, shift: int, *, binary: bool = True) -> Tensor:
    """A sample [T, *] with every set of at most so many moves, [sets, T, *]."""
    lines = x.flatten(1)
    sets: list[tuple[tuple, int]] = [((), 0)]
    for number in range(lines.shape[1]):
        reached = lines_reached(lines[:, number], moves, shift, binary=binary)
        longer = []
        for before, spent in sets:
            for line, price in reached.items():
                if spent + price <= moves:
                    longer.append(((*before, line), spent + price))
        sets = longer
    every = torch.tensor([lines for lines, _ in sets], dtype=x.dtype)
    return every.transpose(1, 2).reshape(-1, *x.shape)


def all_of(ball: Events, sample: Tensor) -> Tensor:
    """Every sample of a ball around one [T, *], [sets, T, *]."""
    budget = int(ball.budget)
    if isinstance(ball, MovedEvents):
        return all_moved(sample, budget, ball.largest_shift, binary=not ball.counts)
    return all_changed(sample, budget, binary=not ball.counts)


def extremes(function, sample: Tensor, ball: Events) -> tuple[Tensor, Tensor]:
    """Least and largest value of every element of a function of [sets, T, *] over a ball."""
    values = function(all_of(ball, sample))
    return values.amin(0), values.amax(0)


def is_one_of(sample: Tensor, every: Tensor) -> bool:
    return any(torch.equal(sample, one) for one in every)


def entering(x: Tensor, ball: Events) -> Bounds:
    """Bounds of frames [N, T, *] of which events change or move."""
    box = ball.box(x)
    found = Bounds(x, (box.high - box.low) / 2)
    found.changes = ball.changes(x, summed=False)
    return found


@dataclass(frozen=True)
class Kind:
    """What may happen to events, and how many of them a value may hold: 1 in binary frames."""

    norm: str
    most: int = 1

    @property
    def counts(self) -> bool:
        return self.most > 1

    @property
    def moves(self) -> bool:
        return self.norm == "moves"

    def ball(self, x: Tensor, budget: float, shift: int = 1) -> Events:
        if self.moves:
            return MovedEvents.of(x, budget, shift, counts=self.counts)
        return Flips(budget, self.counts)

    def threat(self, budget: int) -> ThreatModel:
        """Moves are by one frame."""
        shift = 1 if self.moves else None
        return ThreatModel(self.norm, budget, largest_shift=shift, counts=self.counts)

    def every(self, sample: Tensor, budget: int) -> Tensor:
        """All samples of the ball around one [T, *]."""
        return all_of(self.ball(sample[None], budget), sample)

    def frames(self, *shape: int, seed: int = 0) -> Tensor:
        return frames(*shape, seed=seed, most=self.most)

    def apart(self, *shape: int, seed: int = 0) -> Tensor:
        """Frames in which no event has to wait for another to make way: where they are binary and
        events move, an event in the middle has no neighbours.
        """
        x = self.frames(*shape, seed=seed)
        if self.moves and not self.counts:
            x[:, 1] *= (1 - x[:, 0]) * (1 - x[:, 2])
        return x

    def classified(self, model, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """So many samples of frames in float32, and the classes that a model gives them."""
        x = self.frames(count, *SHAPE, seed=seed).float()
        return x, model(x).argmax(1)


KINDS = {
    "flips": Kind("L0"),
    "changed counts": Kind("L0", most=2),
    "moves": Kind("moves"),
    "moved counts": Kind("moves", most=2),
}

NODES = {
    "LIF": lambda: neuron.LIFNode(tau=2.0, v_threshold=0.5),
    "soft": lambda: neuron.LIFNode(tau=2.0, v_threshold=0.5, v_reset=None),
    "rest": lambda: neuron.IFNode(v_threshold=0.4, v_reset=-0.3),
    "DLIF": lambda: DLIFNode(T=T, v_threshold=0.5),
}


def network(*parts, seed=0, scale=1.5):
    """A classifier of frames, whose maps have random weights of some size."""
    torch.manual_seed(seed)
    for part in parts:
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            part.reset_parameters()
            part.weight.data *= scale
    return in_steps(*parts, T=T, kind=SpikingEventClassifier)


def tiny(seed=0, node="LIF", before=()):
    """A classifier of frames [N, T, 2, 3, 3] with 3 classes."""
    parts = [layer.Conv2d(2, 2, 2), NODES[node](), layer.Flatten(), layer.Linear(8, 3)]
    return network(*before, *parts, seed=seed)


def weights(seed=0):
    """A source of weights, the same ones each time that it is made."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_step(z):
    """Frames of samples [N, T, *] as [N * T, *]."""
    return z.flatten(0, 1)
