"""Search for few moves of events in time that fool a model, on the machinery of flips: a move flips
two elements.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sj_robust.attacks._flip_search import Search, apply_flips, largest, made, uniform
from sj_robust.attacks.threat import moves_of


class Limits(NamedTuple):
    """How far events may be moved, in frames."""

    largest_shift: int
    total_shift: int | None


@dataclass(kw_only=True)
class MoveSearch(Search):
    """One run over the samples of a batch; every pixel and polarity keeps its number of events."""

    limits: Limits

    def _flip_largest(self, rows: Tensor, gradient: Tensor, loss: Tensor, size: Tensor) -> None:
        """Make the moves that promise most: the gradient where an event comes minus the one where
        it goes.
        """
        worth = gradient * (0.5 + self.order[rows]) if self.scaled else gradient
        best, target = best_targets(self.x[rows], self.flipped[rows], worth.double(), self.limits)
        gain = best - worth
        if (
            self.limits.total_shift is not None
        ):  # what is gained per frame of shift, since those are scarce
            source = torch.arange(gain.shape[1], device=gain.device).expand_as(target)
            gain = gain / shift_of(self.x, source, target).clamp(min=1)
        ranked = self._ranked(rows, gain)
        size = (size + 1) // 2  # one move for two elements
        ranked, source = ranked.topk(
            min(int(size.max()) + self.settings.probes, ranked.shape[1]), dim=1
        )
        promise = torch.where(ranked.isinf(), ranked, gain.gather(1, source))
        self._take(
            rows, torch.stack((source, target.gather(1, source)), dim=2), promise, loss, size
        )

    def _allowed(self, rows: Tensor, index: Tensor, wanted: Tensor) -> Tensor:
        return allowed(self.x[rows], self.flipped[rows], index, wanted, self.limits)

    def _exchanged(self, rows: Tensor, draw: Tensor, budget: Tensor, share: float) -> Tensor:
        """The moves of a random share of the pixels undone, and as many others made."""
        flipped, lines = self.flipped[rows], self.x[0, 0].numel()
        moved = flipped.view(len(flipped), -1, lines).any(1)
        many = (share * moved.sum(1)).round().long().clamp(min=1)
        undone = largest(draw[:, :lines].masked_fill(~moved, -torch.inf), many)
        kept = flipped & ~undone.repeat(1, self.x.shape[1])
        worth = uniform(self.x, self.private)[rows]
        return kept | random_moved(
            self.x[rows], kept, draw, worth, (budget - kept.sum(1)) // 2, self.limits
        )

    def _ranks(self, rows: Tensor) -> Tensor:
        """Rank of every pixel and polarity with moves by their importance at the end of growth; -1:
        none.
        """
        gradient, _, _ = self._gradient(rows)
        flipped, T = self.flipped[rows], self.x.shape[1]
        gain = (
            (gradient * self._direction(rows))
            .double()
            .masked_fill(~flipped, 0.0)
            .view(len(rows), T, -1)
            .sum(1)
        )
        moved = flipped.view(len(rows), T, -1).any(1)
        rank = gain.masked_fill(~moved, torch.inf).argsort(1).argsort(1)
        return torch.where(moved, rank, -1).repeat(1, T)


def best_targets(
    x: Tensor, flipped: Tensor, worth: Tensor, limits: Limits
) -> tuple[Tensor, Tensor]:
    """The largest worth within reach of every event that has not moved, and where; [n, D] each,
    -inf without one.

    Within reach are empty elements of the same pixel and polarity that were empty from the start,
    as far as both limits go.
    """
    T = x.shape[1]
    free = (x.flatten(2) == 0) & ~flipped.view(len(x), T, -1)
    value = worth.view(len(x), T, -1).masked_fill(~free, -torch.inf)
    number = torch.arange(x[0].numel(), device=x.device).view(1, T, -1).expand_as(value)
    best, target = torch.full_like(value, -torch.inf), number.clone()
    left = torch.full((len(x), 1, 1), T, device=x.device)
    if limits.total_shift is not None:
        left = (limits.total_shift - moves_of(x, apply_flips(x, flipped)).total_shift).view(
            -1, 1, 1
        )
    for step in range(1, limits.largest_shift + 1):
        for to, start in (
            (slice(step, None), slice(None, T - step)),
            (slice(None, T - step), slice(step, None)),
        ):
            better = (value[:, to] > best[:, start]) & (left >= step)
            best[:, start] = torch.where(better, value[:, to], best[:, start])
            target[:, start] = torch.where(better, number[:, to], target[:, start])
    here = (x.flatten(1) > 0) & ~flipped
    return best.flatten(1).masked_fill(~here, -torch.inf), target.flatten(1)


def allowed(x: Tensor, flipped: Tensor, index: Tensor, wanted: Tensor, limits: Limits) -> Tensor:
    """Which of the wanted moves [n, K] (from, to) may be made in this order: one per place, within
    the total shift.
    """
    source, target = index.unbind(2)
    same = (target[:, :, None] == target[:, None, :]) & wanted[:, None, :]
    wanted = wanted & ~same.tril(-1).any(2)
    if limits.total_shift is None:
        return wanted
    spent = moves_of(x, apply_flips(x, flipped)).total_shift
    return wanted & (
        spent[:, None] + (shift_of(x, source, target) * wanted).cumsum(1) <= limits.total_shift
    )


def random_moved(
    x: Tensor, flipped: Tensor, order: Tensor, worth: Tensor, size: Tensor, limits: Limits
) -> Tensor:
    """Elements [n, D] flipped by ``size`` [n] random moves more, events by ``order``, places by
    ``worth``, both random.

    Fewer, where budgets or free places end before.
    """
    best, target = best_targets(x, flipped, worth.double(), limits)
    ranked, source = (
        order.double()
        .masked_fill(best.isinf(), -torch.inf)
        .topk(min(2 * int(size.max().clamp(min=0)) + 8, order.shape[1]), dim=1)
    )
    index = torch.stack((source, target.gather(1, source)), dim=2)
    return made(index, allowed(x, flipped, index, ~ranked.isinf(), limits), size, like=flipped)


def shift_of(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Frames between two elements of a pixel."""
    return (source - target).abs() // x[0, 0].numel()
