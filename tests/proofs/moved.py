"""What proofs of events are held against: all frames that moves in time lead to, one by one; and
bounds of frames of which events change.
"""

from itertools import product

import torch
from torch import Tensor

from sj_robust.proofs.moves import Events
from sj_robust.proofs.rules import Bounds


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


def entering(x: Tensor, ball: Events) -> Bounds:
    """Bounds of frames [N, T, *] of which events change or move."""
    box = ball.box(x)
    found = Bounds(x, (box.high - box.low) / 2)
    found.changes = ball.changes(x, summed=False)
    return found
