"""Balls of event frames: at most m events moved in time, each by a few frames."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sj_robust.proofs.changes import Changes, Flips, first_changes, frame_numbers, frames_of_rows
from sj_robust.proofs.spiking import Interval

__all__ = ["EVENTS", "Events", "MovedEvents", "Shifts"]

_LISTED = 256
"""Frames of a pixel and polarity that its moves can lead to and that are listed one by one."""

_CODED = 62
"""Binary values that an integer of 64 bits holds."""


@dataclass(frozen=True)
class MovedEvents:
    """Event frames [N, T, *] of which at most ``budget`` events are moved in time: an event keeps
    pixel and polarity and comes at most ``largest_shift`` frames earlier or later.
    至多移动若干事件的球。

    An event may go where another one is if that one moves on. Frames hold 0 or 1, or with
    ``counts`` the number of events.

    Attributes:
        budget: Number of moved events; in training it may lie between two integers.
        largest_shift: Frames by which an event moves at most.
        counts: Whether a frame may hold several events of a pixel and polarity.

    Source: derived here; see ``docs/concepts/verified_events.md``.

    Examples:
        >>> x = torch.tensor([[[1.0], [0.0], [0.0]]])
        >>> MovedEvents(1, 1).lowest(x, torch.tensor([[[0.0], [-1.0], [-5.0]]])).flatten()
        tensor([0., 1., 0.])
    """

    budget: float
    largest_shift: int
    counts: bool = False

    @classmethod
    def of(
        cls, frames: Tensor, budget: float, largest_shift: int | None, *, counts: bool = False
    ) -> "MovedEvents":
        """The moves of given frames; None is any shift."""
        T = frames.shape[1]
        shift = T - 1 if largest_shift is None else min(largest_shift, T - 1)
        return cls(budget, shift, counts)

    @property
    def most(self) -> int:
        """Number of moves that the budget pays in part or as a whole."""
        return math.ceil(self.budget)

    def reach(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """How many events can come to each value at most, and how many can leave it."""
        near = self.near(frames)
        if self.counts:
            may_move = frames.shape[1] > 1 and self.largest_shift > 0
            return near, frames * may_move
        empty = 1 - frames
        # events of full frames in between can make way, at the price of a move each
        there_is_room = _within(empty, self.largest_shift * self.most) > 0
        return empty * (near > 0), frames * there_is_room

    def near(self, frames: Tensor) -> Tensor:
        """How many events of other frames are near enough to come to each value."""
        return _within(frames, self.largest_shift)

    def box(self, frames: Tensor) -> Interval:
        """An interval of every value around the frames that holds what it may change to."""
        coming, leaving = self.reach(frames)
        radius = torch.maximum(coming, leaving).clamp(max=self.most)
        return Interval(frames - radius, frames + radius)

    def changes(self, frames: Tensor, *, summed: bool) -> "Shifts":
        """What moves can change in each frame; ``summed`` keeps no single changes behind the first
        map.
        """
        coming, leaving = self.reach(frames)
        largest = int(torch.maximum(coming, leaving).max()) if frames.numel() else 0
        most = max(1, min(self.most, largest))
        numbers = range(1, most + 1)
        return Shifts(
            self.budget,
            up=tuple((coming >= number).to(frames.dtype) for number in numbers),
            down=tuple((leaving >= number).to(frames.dtype) for number in numbers),
            frame=frame_numbers(frames),
            apart=True,
            summed=summed,
            ball=self,
            frames=frames,
        )

    def lowest(self, frames: Tensor, weights: Tensor) -> Tensor:
        """Frames of the ball whose sum with the weights is low, with one move at most of a pixel
        and polarity; frames may be one for several rows of weights.
        """
        x = frames.expand(weights.shape).flatten(2)
        w = weights.flatten(2).to(torch.float64)
        T = x.shape[1]
        best = torch.zeros_like(w[:, 0])
        source = torch.zeros_like(best, dtype=torch.int64)
        target = torch.zeros_like(source)
        for t in range(T):
            for to in _places_near(t, T, self.largest_shift):
                possible = x[:, t] > 0
                if not self.counts:
                    possible &= x[:, to] == 0
                fall = torch.where(possible, w[:, t] - w[:, to], 0.0)
                better = fall > best
                best = torch.where(better, fall, best)
                source = torch.where(better, t, source)
                target = torch.where(better, to, target)
        count = min(int(self.budget), best.shape[1])
        falls, places = best.topk(count, 1)
        pays = (falls > 0).to(best.dtype)
        chosen = torch.zeros_like(best).scatter(1, places, pays)
        events = chosen.to(x.dtype).unsqueeze(1)
        without = x.scatter_add(1, source.unsqueeze(1), -events)
        found = without.scatter_add(1, target.unsqueeze(1), events)
        return found.view(weights.shape)

    def gains(self, lines: Tensor, weights: Tensor) -> Tensor:
        """What moves within a line add to its sum with weights, [M, moves]: the sum of the first k
        is as much as k moves can add, or more. 移动一条时间线上的事件所得。

        Equation, for a line x [T] of events of one pixel and polarity and the lines y that cost[y]
        moves lead to::

            G[k] = max over y with cost[y] <= k of sum_t w[t] (y[t] - x[t])

        and the gains are the steps of the least concave sequence that is nowhere below G. Of a
        binary line that moves can turn into more than 256 others, and of counts, each event has its
        own gain::

            max over t' with |t' - t| <= s of w[t'] - w[t]

        which is exact for counts, and for binary lines leaves out that a frame holds one event.

        Args:
            lines: Events of a pixel and polarity, [M, T].
            weights: Of each line, [M, T].
        """
        alone = self._gains_of_events(lines, weights)
        if self.counts or lines.shape[1] > _CODED:
            return alone
        patterns, number = _distinct(lines)
        if not len(patterns):
            return alone
        parts = []
        rows = []
        for which, pattern in enumerate(patterns.long().tolist()):
            own = (number == which).nonzero().squeeze(1)
            listed = _listed_moves(tuple(pattern), self.largest_shift, self.most)
            part = alone[own] if listed is None else listed.gains(weights[own])
            rows.append(own)
            parts.append(part)
        width = max(1, *(part.shape[1] for part in parts))
        padded = []
        for part in parts:
            missing = width - part.shape[1]
            padded.append(F.pad(part, (0, missing)))
        place = torch.cat(rows).argsort()
        return torch.cat(padded)[place]

    def _gains_of_events(self, lines: Tensor, weights: Tensor) -> Tensor:
        """The same if each event moves for itself."""
        gain = _highest_within(weights, self.largest_shift) - weights
        largest = int(lines.max()) if lines.numel() else 0
        copies = max(1, min(self.most, largest))
        of_copies = []
        for number in range(1, copies + 1):
            is_there = lines >= number
            of_copies.append(gain * is_there)
        return first_changes(torch.cat(of_copies, 1), self.budget, 1)


Events = Flips | MovedEvents
"""A ball of event frames."""

EVENTS = (Flips, MovedEvents)
"""The same for ``isinstance``."""


@dataclass(frozen=True)
class Shifts(Changes):
    """What moved events can do to each element of a tensor. 事件的时间移动的影响。

    A move takes an event out of one frame and brings it into another, so that in a frame it is a
    fall or a rise, as a flip is: the budget is that of a step. Elements that depend on several
    frames have no bounds of this kind. For sums over time see :meth:`over_time`.

    Attributes:
        ball: The moves.
        frames: The frames [N, T, *].
    """

    ball: MovedEvents | None = None
    frames: Tensor | None = None

    def linear(self, weight: Tensor, shape: torch.Size) -> Changes | None:
        """See :class:`Changes`; None if a row has values of several frames."""
        rows = frames_of_rows(self.frame.flatten(0, -2))
        return None if rows is None else super().linear(weight, shape)

    def convolved(self, weight: Tensor, shape: torch.Size, **geometry: Any) -> Changes | None:
        """See :class:`Changes`; None if an image has values of several frames."""
        if self.frame.ndim != 4 or frames_of_rows(self.frame) is None:
            return None
        return super().convolved(weight, shape, **geometry)

    def over_time(self, weights: Tensor) -> "Shifts":
        """How far sums over time of the frames' values can rise and fall: step t has what moves do
        to ``sum_k weights[t, k] x[k]``, for weights [T, T].
        """
        assert self.ball is not None
        assert self.frames is not None
        lines = _as_lines(self.frames)
        patterns, pattern_of_line = _distinct(lines.flatten(0, 1))
        every = patterns.repeat_interleave(len(weights), 0)
        sums = weights.to(lines).repeat(len(patterns), 1)
        number = pattern_of_line.view(lines.shape[:2])
        rises = self.ball.gains(every, sums)
        falls = self.ball.gains(every, -sums)
        up = self._in_frames(rises, number)
        down = self._in_frames(falls, number)
        count = max(len(up), len(down))
        return Shifts(
            self.budget,
            up=_with_zeros(up, count),
            down=_with_zeros(down, count),
            frame=frame_numbers(self.frames),
            apart=True,
        )

    def _in_frames(self, gains: Tensor, number: Tensor) -> list[Tensor]:
        """Gains of patterns and steps, [P T, moves], as those of every value of the frames, move by
        move, without moves that gain nothing; ``number`` is the pattern of each line, [N, lines].
        """
        assert self.frames is not None
        shape = self.frames.shape
        by_pattern = gains.view(-1, shape[1], gains.shape[1])
        by_line = by_pattern[number]
        moves = [part for part in by_line.unbind(3) if bool(part.any())]
        if not moves:
            moves = [by_line[..., 0]]
        return [part.transpose(1, 2).reshape(shape) for part in moves]


def _as_lines(frames: Tensor) -> Tensor:
    """Frames [N, T, *] as the lines of every pixel and polarity, [N, lines, T]."""
    return frames.flatten(2).transpose(1, 2)


def _with_zeros(parts: list[Tensor], count: int) -> tuple[Tensor, ...]:
    """So many tensors, of which the last ones are zero."""
    zeros = torch.zeros_like(parts[0])
    missing = count - len(parts)
    return (*parts, *[zeros] * missing)


def _places_near(t: int, T: int, shift: int) -> range:
    """Frames to which an event of frame t can move, its own included."""
    first = max(0, t - shift)
    last = min(T - 1, t + shift)
    return range(first, last + 1)


def _within(part: Tensor, shift: int) -> Tensor:
    """The sum of what is at most so many frames away, itself left out."""
    found = torch.zeros_like(part)
    farthest = min(shift, part.shape[1] - 1)
    for distance in range(1, farthest + 1):
        found[:, distance:] += part[:, :-distance]
        found[:, :-distance] += part[:, distance:]
    return found


def _highest_within(weights: Tensor, shift: int) -> Tensor:
    """The largest weight at most so many frames away, [M, T]."""
    shifted = [weights]
    T = weights.shape[1]
    for distance in range(1, min(shift, T - 1) + 1):
        outside = weights.new_full((len(weights), distance), -torch.inf)
        earlier = weights[:, :-distance]
        later = weights[:, distance:]
        shifted.append(torch.cat([outside, earlier], 1))
        shifted.append(torch.cat([later, outside], 1))
    return torch.stack(shifted).amax(0)


def _distinct(lines: Tensor) -> tuple[Tensor, Tensor]:
    """Lines [M, T] of which no two are the same, and by line which of these it is."""
    holds_counts = lines.numel() > 0 and float(lines.max()) > 1
    if holds_counts or lines.shape[1] > _CODED:
        found, number = torch.unique(lines, dim=0, return_inverse=True)
        return found, number
    powers = 2 ** torch.arange(lines.shape[1], device=lines.device)
    codes = (lines.long() * powers).sum(1)
    distinct, number = torch.unique(codes, return_inverse=True)
    is_set = (distinct.unsqueeze(1) & powers) > 0
    return is_set.to(lines.dtype), number


@dataclass(frozen=True)
class _ListedMoves:
    """All lines that moves lead to from one.

    Attributes:
        added: What moves add to it, [lines, T].
        costs: Least number of moves that each takes.
    """

    added: tuple[tuple[int, ...], ...]
    costs: tuple[int, ...]

    def gains(self, weights: Tensor) -> Tensor:
        """See :meth:`MovedEvents.gains`: of lines that are this one, with weights [M, T]."""
        added = weights.new_tensor(self.added)
        sums = weights @ added.T
        costs = torch.tensor(self.costs, device=weights.device)
        best = []
        for moves in range(max(self.costs) + 1):
            affordable = costs <= moves
            best.append(sums[:, affordable].amax(1))
        return _concave(torch.stack(best, 1)).diff(dim=1)


@lru_cache(maxsize=2**14)
def _listed_moves(line: tuple[int, ...], shift: int, most: int) -> _ListedMoves | None:
    """What at most so many moves can make of a binary line; None if it is more than can be
    listed.
    """
    costs = {0: 0}  # by the places that the events so far take, as bits
    for t, event in enumerate(line):
        if not event:
            continue
        costs = _with_an_event(costs, t, _places_near(t, len(line), shift), most)
        if len(costs) > _LISTED:
            return None
    added = []
    for taken in costs:
        change = []
        for t, before in enumerate(line):
            after = taken >> t & 1
            change.append(after - before)
        added.append(tuple(change))
    return _ListedMoves(tuple(added), tuple(costs.values()))


def _with_an_event(costs: dict[int, int], t: int, near: range, most: int) -> dict[int, int]:
    """The places that are taken once an event of frame t has its own as well, with the least number
    of moves.
    """
    found: dict[int, int] = {}
    for taken, cost in costs.items():
        for to in near:
            place = 1 << to
            is_taken = taken & place
            moves = cost if to == t else cost + 1
            if is_taken or moves > most:
                continue
            together = taken | place
            found[together] = min(moves, found.get(together, moves))
    return found


def _concave(values: Tensor) -> Tensor:
    """The least concave sequence [M, K] that is nowhere below the values."""
    count = values.shape[1]
    columns = []
    for k in range(count):
        heights = [values[:, k]]
        for i in range(k):
            for j in range(k + 1, count):
                share = (k - i) / (j - i)
                chord = (1 - share) * values[:, i] + share * values[:, j]
                heights.append(chord)
        columns.append(torch.stack(heights).amax(0))
    return torch.stack(columns, 1)
