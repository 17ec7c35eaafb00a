"""Frames of event counts as binary frames with more channels, so that one search serves both.

Which planes there are depends on the budget, not on the frames; planes that nothing in the batch
has events for are left out, and change no result.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Planes", "each_on_its_own", "in_units", "summed", "taking_planes"]

_MOST = 8
"""Events that a search adds to a value at most, and removes from one."""


@dataclass(frozen=True)
class Planes:
    """Numbers of events [N, T, C, H, W] as planes in the place of channels, of which the model sees
    the sum.

    First come planes of zeros, an event of each of which may be added; then one of all events that
    stay; then planes of events that may be removed, plane k of them 1 where the value is above k.

    Attributes:
        frames: [N, T, planes * C, H, W].
        added: Planes of zeros.
        number: Planes.
    """

    frames: Tensor
    added: int
    number: int

    def by_plane(self, values: Tensor) -> Tensor:
        """Values [n, D] as [n, T, planes, elements of a plane], a view."""
        size = self.frames.shape[2:].numel() // self.number  # also where there are no samples
        return values.view(len(values), self.frames.shape[1], self.number, size)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Where an event may be added, and where one may be removed, [N, D] bool each."""
        add = torch.zeros_like(self.frames.flatten(1), dtype=torch.bool)
        self.by_plane(add)[:, :, : self.added] = True
        remove = self.frames.flatten(1) == 1
        self.by_plane(remove)[:, :, : self.added + 1] = False
        return add, remove

    def next_in_turn(self, changed: Tensor) -> Tensor:
        """Of changes [n, D] so far, where the next event of a value may be added or removed: those
        of a value are alike, so that each waits for the one before.
        """
        done = torch.ones_like(changed)
        by_plane = self.by_plane(done)
        by_plane[:, :, 1:] = self.by_plane(changed)[:, :, :-1]
        by_plane[:, :, self.added + 1] = True
        return done

    def one_way(self, scores: Tensor) -> Tensor:
        """Scores [n, D], minus infinity where the other direction of a value has a larger one."""
        by_plane = self.by_plane(scores)
        added, removed = by_plane.tensor_split([self.added], dim=2)
        is_less = [added < removed.amax(2, keepdim=True), removed < added.amax(2, keepdim=True)]
        return scores.masked_fill(torch.cat(is_less, 2).flatten(1), -torch.inf)

    def of_units(self, draws: Tensor) -> Tensor:
        """Draws [N, T * 2 * elements of a plane] for events that are added and for those that are
        removed, [N, D]: all planes of a kind have the same.
        """
        of_kinds = draws.view(len(draws), self.frames.shape[1], 2, -1)
        add = of_kinds[:, :, :1]
        remove = of_kinds[:, :, 1:]
        removed = self.number - self.added
        of_added = add.expand(-1, -1, self.added, -1)
        of_removed = remove.expand(-1, -1, removed, -1)
        return torch.cat([of_added, of_removed], 2).flatten(1)


def in_units(x: Tensor, most: int) -> Planes:
    """Frames of counts for a search that changes ``most`` events."""
    most = min(most, _MOST)
    present = int(x.max()) if x.numel() else 0
    removed = max(1, min(most, present))
    may_be_added = [torch.zeros_like(x)] * most
    stay = (x - most).clamp(min=0)
    may_be_removed = [(x > k).to(x.dtype) for k in range(removed)]
    planes = [*may_be_added, stay, *may_be_removed]
    return Planes(torch.cat(planes, 2), most, len(planes))


def each_on_its_own(x: Tensor, *, counts: bool) -> tuple[Tensor, int]:
    """Frames [N, T, C, H, W] for moves in time, with planes in the place of channels, and how many:
    of counts every event of a pixel and polarity has a plane of its own, so that none is in the way
    of another. Binary frames are their only plane.
    """
    if not counts or not x.numel():
        return x, 1
    until = x.cumsum(1)
    before = until - x
    planes = max(1, int(until.max()))
    found = []
    for number in range(planes):
        has_event = (until > number) & (before <= number)
        found.append(has_event.to(x.dtype))
    return torch.cat(found, 2), planes


def summed(frames: Tensor, planes: int) -> Tensor:
    """The numbers of events of frames in planes."""
    if planes == 1:
        return frames
    N, T, channels, *size = frames.shape
    return frames.view(N, T, planes, channels // planes, *size).sum(2)


def taking_planes(model: Callable[[Tensor], Tensor], planes: int) -> Callable[[Tensor], Tensor]:
    """A model of frames as one of frames in planes."""
    return model if planes == 1 else lambda frames: model(summed(frames, planes))
