"""Balls of event frames: at most k changed values, or at most k events added and removed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sj_robust.ops.limits import at_least
from sj_robust.proofs.changes import Changes, frame_numbers
from sj_robust.proofs.spiking import Interval

__all__ = ["Flips"]


@dataclass(frozen=True)
class Flips:
    """Binary event frames [N, T, *] of which at most ``budget`` values are changed, 0 to 1 or 1
    to 0. 至多翻转若干事件的球。

    With ``counts`` frames hold numbers of events, and a change adds one to a value or removes one,
    as often as the budget pays; no value falls below 0.

    Attributes:
        budget: Number of changes; in training it may lie between two integers.
        counts: Whether frames hold numbers of events.

    Examples:
        >>> x = torch.tensor([[[1.0, 0.0, 1.0]]])
        >>> Flips(2).lowest(x, torch.tensor([[[1.0, -3.0, -2.0]]]))
        tensor([[[0., 1., 1.]]])
    """

    budget: float
    counts: bool = False

    @property
    def most(self) -> int:
        """Changes of one value that the budget pays in part or as a whole."""
        return math.ceil(self.budget) if self.counts else 1

    def reach(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """How many events can be added to each value at most, and how many removed."""
        if not self.counts:
            return 1 - frames, frames
        return torch.full_like(frames, self.most), frames.clamp(max=self.most)

    def box(self, frames: Tensor) -> Interval:
        """An interval of every value around the frames that holds what it may change to."""
        return Interval(frames - self.most, frames + self.most)

    def changes(self, frames: Tensor, *, summed: bool) -> Changes:
        """What each value can change by; ``summed`` keeps no single changes behind the first
        map.
        """
        added, removed = self.reach(frames)
        numbers = range(1, max(1, self.most) + 1)
        return Changes(
            self.budget,
            up=tuple((added >= number).to(frames.dtype) for number in numbers),
            down=tuple((removed >= number).to(frames.dtype) for number in numbers),
            frame=frame_numbers(frames),
            apart=True,
            summed=summed,
        )

    def falls(self, frames: Tensor, weights: Tensor) -> Tensor:
        """How far a change of each value lowers sums with weights [R, T, *] of frames [1, T, *]."""
        if self.counts:
            return torch.where(weights < 0, -weights, weights * (frames > 0))
        return at_least(weights * (2 * frames - 1), 0.0)

    def times(self, frames: Tensor, weights: Tensor) -> Tensor:
        """How often each value can be changed so, [R, T, *]."""
        added, removed = self.reach(frames)
        return torch.where(weights < 0, added, removed)

    def lowest(self, frames: Tensor, weights: Tensor) -> Tensor:
        """The frames of the ball whose sum with the weights is least; frames may be one for several
        rows of weights.
        """
        frames = frames.expand(weights.shape)
        if self.counts:
            return self._lowest_counts(frames, weights)
        falls = (weights * (2 * frames - 1)).flatten(1)
        values, places = falls.topk(self._changes_of(falls), 1)
        pays = (values > 0).to(falls.dtype)
        chosen = torch.zeros_like(falls).scatter(1, places, pays)
        return torch.where(chosen.view_as(weights) > 0, 1 - frames, frames)

    def _changes_of(self, falls: Tensor) -> int:
        """How many of the changes [R, changes] the budget allows."""
        return min(int(self.budget), falls.shape[1])

    def drawn(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Frames with changes at random places, as many as the budget allows; of numbers of events
        fewer where a value has not enough to lose.
        """
        if self.counts:
            return self._drawn_counts(frames, generator)
        drawn = torch.rand(frames.shape, generator=generator, dtype=torch.float64)
        weights = drawn.to(frames.device) * (2 * frames - 1)
        return self.lowest(frames, weights).to(frames.dtype)

    def _lowest_counts(self, frames: Tensor, weights: Tensor) -> Tensor:
        """The same for numbers of events: of a value there may be several changes."""
        each = self.falls(frames, weights).flatten(1)
        times = self.times(frames, weights).flatten(1)
        numbers = range(1, self.most + 1)
        every = [each * (times >= number) for number in numbers]
        if not every:
            return frames
        falls = torch.cat(every, 1)
        values, places = falls.topk(self._changes_of(falls), 1)
        elements = places % each.shape[1]
        pays = (values > 0).to(each.dtype)
        spent = torch.zeros_like(each).scatter_add(1, elements, pays)
        direction = torch.where(weights < 0, 1.0, -1.0).to(frames.dtype)
        return frames + direction * spent.view_as(weights).to(frames.dtype)

    def _drawn_counts(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """The same for numbers of events: a value whose place is drawn twice changes twice."""
        x = frames.flatten(1)
        draws = (len(x), int(self.budget))
        drawn = torch.randint(x.shape[1], draws, generator=generator)
        places = drawn.to(x.device)
        drawn_again = torch.rand(x.shape, generator=generator)
        loses = drawn_again.to(x.device) < 0.5
        once = torch.ones_like(places, dtype=x.dtype)
        times = torch.zeros_like(x).scatter_add(1, places, once)
        fewer = (x - times).clamp(min=0)
        more = x + times
        changed = torch.where(loses & (x > 0), fewer, more)
        return changed.view_as(frames)
