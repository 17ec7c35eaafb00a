"""Search for few moves of events in time that fool a model, on the machinery of changes: a move
changes two elements.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sj_robust.attacks._event_search import (
    Candidates,
    EventSearch,
    apply_changes,
    largest,
    made,
    share_of,
    uniform,
    uniform_by_plane,
)
from sj_robust.core.randomness import Private
from sj_robust.core.threat import moves_of


@dataclass(frozen=True)
class Limits:
    """How far events may be moved, in frames."""

    largest_shift: int
    total_shift: int | None


@dataclass(frozen=True)
class Targets:
    """Where every event would best move to."""

    worth: Tensor
    """What there is to gain at that place, [n, D]; minus infinity without an event or a place."""
    index: Tensor
    """The element that it is, [n, D]."""


@dataclass(kw_only=True)
class MoveSearch(EventSearch):
    """One run over the samples of a batch; every pixel and polarity keeps its number of events."""

    limits: Limits
    planes: int | None = None
    """Planes of numbers of events; None for binary frames."""

    def _drawn(self) -> Tensor:
        return drawn_for_moves(self.x, self.private, self.planes)

    def _change_largest(
        self,
        rows: Tensor,
        gradient: Tensor,
        loss: Tensor,
        size: Tensor,
    ) -> None:
        """Make the moves that promise most: the gradient where an event comes minus the one where
        it goes.
        """
        worth = gradient * (0.5 + self.order[rows]) if self.scaled else gradient
        targets = best_targets(
            self.x[rows],
            self.changed[rows],
            worth.double(),
            self.limits,
        )
        gain = targets.worth - worth
        if self.limits.total_shift is not None:
            # what is gained per frame of shift, since those are scarce
            source = torch.arange(gain.shape[1], device=gain.device).expand_as(gain)
            shifts = shift_of(self.x, source, targets.index)
            gain = gain / shifts.clamp(min=1)
        ranked = self._ranked(rows, gain)
        size = (size + 1) // 2  # one move for two elements
        ranked, source = ranked.topk(self._many(size, ranked), dim=1)
        own_gain = gain.gather(1, source)
        promise = torch.where(ranked.isinf(), ranked, own_gain)
        self._take(rows, Candidates(_pairs(source, targets), promise), loss, size)

    def _allowed(
        self,
        rows: Tensor,
        index: Tensor,
        wanted: Tensor,
    ) -> Tensor:
        return allowed(
            self.x[rows],
            self.changed[rows],
            index,
            wanted,
            self.limits,
        )

    def _exchanged(
        self,
        rows: Tensor,
        draw: Tensor,
        budget: Tensor,
        share: float,
    ) -> Tensor:
        """The moves of a random share of the pixels undone, and as many others made."""
        changed = self.changed[rows]
        frames = self.x.shape[1]
        moved = changed.view(len(rows), frames, -1).any(1)
        many = share_of(moved, share)
        of_lines = draw[:, : moved.shape[1]]
        undone = largest(of_lines.masked_fill(~moved, -torch.inf), many)
        kept = changed & ~undone.repeat(1, frames)
        drawn = RandomMoves(draw, self._drawn()[rows])
        left = (budget - kept.sum(1)) // 2
        return kept | random_moved(
            self.x[rows],
            kept,
            drawn,
            left,
            self.limits,
        )

    def _ranks(self, rows: Tensor) -> Tensor:
        """Rank of every pixel and polarity with moves by their importance at the end of growth; -1:
        none.
        """
        gradient, _ = self._gradient(rows)
        changed = self.changed[rows]
        frames = self.x.shape[1]
        gain = (gradient * self._direction(rows)).double()
        gain = gain.masked_fill(~changed, 0.0)
        gain = gain.view(len(rows), frames, -1).sum(1)
        moved = changed.view(len(rows), frames, -1).any(1)
        of_moved = gain.masked_fill(~moved, torch.inf)
        order = of_moved.argsort(dim=1, stable=True)
        rank = order.argsort(1)
        return torch.where(moved, rank, -1).repeat(1, frames)


@dataclass(frozen=True)
class RandomMoves:
    """Random numbers [n, D] that decide which events move and where to."""

    order: Tensor
    worth: Tensor


def best_targets(
    x: Tensor,
    changed: Tensor,
    worth: Tensor,
    limits: Limits,
) -> Targets:
    """The largest worth within reach of every event that has not moved, and where.

    Within reach are empty elements of the same pixel and polarity that were empty from the start,
    as far as both limits go.
    """
    n, frames = x.shape[:2]
    free = (x.flatten(2) == 0) & ~changed.view(n, frames, -1)
    value = worth.view(n, frames, -1).masked_fill(~free, -torch.inf)
    number = torch.arange(x[0].numel(), device=x.device)
    number = number.view(1, frames, -1).expand_as(value)
    best = torch.full_like(value, -torch.inf)
    target = number.clone()
    left = _frames_left(x, changed, limits).view(n, 1, 1)
    for shift in range(1, limits.largest_shift + 1):
        early = slice(None, frames - shift)
        late = slice(shift, None)
        for source, to in ((early, late), (late, early)):
            so_far = best[:, source]
            there = value[:, to]
            better = (there > so_far) & (left >= shift)
            best[:, source] = torch.where(better, there, so_far)
            there_too = number[:, to]
            target[:, source] = torch.where(better, there_too, target[:, source])
    here = (x.flatten(1) > 0) & ~changed
    best = best.flatten(1).masked_fill(~here, -torch.inf)
    return Targets(best, target.flatten(1))


def allowed(
    x: Tensor,
    changed: Tensor,
    index: Tensor,
    wanted: Tensor,
    limits: Limits,
) -> Tensor:
    """Which of the wanted moves [n, K] (from, to) may be made in this order: one per place, within
    the total shift.
    """
    source, target = index.unbind(2)
    same = target[:, :, None] == target[:, None, :]
    same_wanted = same & wanted[:, None, :]
    wanted = wanted & ~same_wanted.tril(-1).any(2)
    if limits.total_shift is None:
        return wanted
    shifts = (shift_of(x, source, target) * wanted).cumsum(1)
    return wanted & (shifts <= _frames_left(x, changed, limits)[:, None])


def random_moved(
    x: Tensor, changed: Tensor, drawn: RandomMoves, size: Tensor, limits: Limits
) -> Tensor:
    """Elements [n, D] changed by ``size`` [n] random moves more.

    Fewer, where budgets or free places end before.
    """
    targets = best_targets(x, changed, drawn.worth.double(), limits)
    order = drawn.order.double().masked_fill(targets.worth.isinf(), -torch.inf)
    many = 2 * int(size.max().clamp(min=0)) + 8
    ranked, source = order.topk(min(many, order.shape[1]), dim=1)
    index = _pairs(source, targets)
    number = torch.arange(ranked.shape[1], device=x.device)
    own = number < (2 * size.clamp(min=0) + 8)[:, None]  # not that of a neighbour
    wanted = allowed(
        x,
        changed,
        index,
        ~ranked.isinf() & own,
        limits,
    )
    return made(index, wanted, size, like=changed)


def drawn_for_moves(x: Tensor, private: Private, planes: int | None) -> Tensor:
    """Uniform numbers [N, D] of frames, in so many planes if they hold numbers of events."""
    return uniform(x, private) if planes is None else uniform_by_plane(x, private, planes)


def shift_of(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Frames between two elements of a pixel."""
    return (source - target).abs() // x[0, 0].numel()


def _pairs(source: Tensor, targets: Targets) -> Tensor:
    """The two elements of the moves from ``source`` [n, K], [n, K, 2]."""
    target = targets.index.gather(1, source)
    return torch.stack((source, target), dim=2)


def _frames_left(x: Tensor, changed: Tensor, limits: Limits) -> Tensor:
    """Frames by which the events of a sample may still move together, [n]."""
    if limits.total_shift is None:
        return torch.full((len(x),), x.shape[1], device=x.device)
    return limits.total_shift - moves_of(x, apply_changes(x, changed)).total_shift
