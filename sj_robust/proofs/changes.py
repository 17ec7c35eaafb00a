"""Balls of changed events, and their largest effect on the currents of the first layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sj_robust.core.broadcast import along
from sj_robust.ops.limits import at_least
from sj_robust.proofs.spiking import Interval

__all__ = [
    "Changes",
    "Flips",
    "changed_sums",
    "first_changes",
    "frame_numbers",
    "frames_of_rows",
    "share_frames",
]

_EXACT_BITS = 52
"""Binary values that a number in float64 holds exactly."""

_COMPARED = 128
"""Largest number of inputs of rows that are compared, so that equal rows are bounded once."""

_CANDIDATES = 16
"""Largest weights that are examined for each value that may have to change."""

_ELEMENTS = 2**21
"""Values of outputs that are bounded together."""

_SEVERAL = -1
"""Number in the place of a frame's where events of several frames move an element."""


@dataclass(frozen=True)
class Changes:
    """How far each element of a tensor moves if single events change, and how many may change.
    单个事件翻转对每个元素的影响。

    Equation, for ``y = A x + b`` of binary x, of which at most k elements change::

        d[j, i] = A[j, i] (1 - 2 x[i])
        y[j] + sum of the k least d[j, i] below 0  <=  y~[j]
        y[j] + sum of the k largest d[j, i] above 0  >=  y~[j]

    Both are reached: an event changes a value in one direction only. Of numbers of events, each
    value has a d below 0 and one above for each event that it may gain or lose. A budget that is
    not an integer, as while a training raises it, counts the next change in part.

    Attributes:
        budget: Number k of changes, for all elements together.
        up: Largest rises >= 0 by a single change, the largest first, each of the tensor's shape and
            each by another event.
        down: Largest falls >= 0, likewise.
        frame: Number of the frame whose events move an element; -1 for several.
        apart: Whether no event moves two elements, each of which one event moves, as in the frames
            themselves.
        summed: Whether only the sums of the largest changes are kept behind a map, as one change
            that a budget of 1 pays: sums over time then have no budget of their own.
    """

    budget: float
    up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    frame: Tensor
    apart: bool
    summed: bool = False

    def raised(self) -> Tensor:
        """How far each element can rise."""
        return _spent(self.budget, self.up)

    def lowered(self) -> Tensor:
        """How far each element can fall."""
        return _spent(self.budget, self.down)

    def radius(self) -> Tensor:
        """How far each element can move."""
        return torch.maximum(self.raised(), self.lowered())

    def opposite(self) -> "Changes":
        """Of the elements with the other sign."""
        return replace(self, up=self.down, down=self.up)

    def moved(self, move: Callable[[Tensor], Tensor], *, apart: bool) -> "Changes":
        """Of the elements in other places; ``apart`` says whether each is there once at most."""
        return replace(
            self,
            up=tuple(map(move, self.up)),
            down=tuple(map(move, self.down)),
            frame=move(self.frame),
            apart=self.apart and apart,
        )

    def scaled(self, factor: Tensor) -> "Changes | None":
        """Of the elements times a factor that is broadcast to them; None if it makes them more."""
        if (self.frame * factor).shape != self.frame.shape:
            return None
        rising = at_least(factor, 0.0)
        falling = at_least(-factor, 0.0)
        up = []
        down = []
        for rise, fall in zip(self.up, self.down, strict=True):
            up.append(rise * rising + fall * falling)
            down.append(rise * falling + fall * rising)
        return replace(self, up=tuple(up), down=tuple(down))

    def linear(self, weight: Tensor, shape: torch.Size) -> "Changes | None":
        """Of a linear map [outputs, inputs] whose result has this shape."""
        if not self.apart:
            return None
        up = torch.stack([part.flatten(0, -2) for part in self.up])
        down = torch.stack([part.flatten(0, -2) for part in self.down])
        rises, falls = self._largest(up, down, weight)
        rows = self.frame.flatten(0, -2)
        frame = _one_of(rows).unsqueeze(1)
        return replace(
            self,
            budget=1.0 if self.summed else self.budget,
            up=tuple(part.reshape(shape) for part in rises),
            down=tuple(part.reshape(shape) for part in falls),
            frame=frame.expand(-1, shape[-1]).reshape(shape),
            apart=False,
        )

    def convolved(
        self,
        weight: Tensor,
        shape: torch.Size,
        *,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> "Changes | None":
        """Of a convolution [outputs, inputs, height, width] whose result [B, C, H, W] has this
        shape.
        """
        if not self.apart or self.frame.ndim != 4 or isinstance(padding, str):
            return None
        size = weight.shape[2:]

        def patches(parts: tuple[Tensor, ...]) -> Tensor:
            """What the outputs of a group see change, [groups, parts, B * places, inputs]."""
            seen = F.unfold(torch.cat(parts), size, dilation, padding, stride)
            inputs = seen.shape[1] // groups
            places = seen.shape[2]
            by_group = seen.view(len(parts), -1, groups, inputs, places)
            return by_group.permute(2, 0, 1, 4, 3).flatten(2, 3)

        kernels = weight.flatten(1).chunk(groups)
        up: list[Tensor] = []
        down: list[Tensor] = []
        groupwise = zip(patches(self.up), patches(self.down), kernels, strict=True)
        for of_up, of_down, kernel in groupwise:
            rises, falls = self._largest(of_up, of_down, kernel)
            up.append(rises)
            down.append(falls)
        frame = _one_of(self.frame).view(-1, 1, 1, 1)
        return replace(
            self,
            budget=1.0 if self.summed else self.budget,
            up=_in_place(up, shape),
            down=_in_place(down, shape),
            frame=frame.expand(shape),
            apart=False,
        )

    @property
    def _count(self) -> int:
        """Number of changes that the budget covers, in part or as a whole; at least 1."""
        return max(1, math.ceil(self.budget))

    def _largest(self, up: Tensor, down: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Largest rises and falls, [count, rows, outputs] each, of sums with weights
        [outputs, inputs] of values that rise by ``up`` and fall by ``down``,
        [changes, rows, inputs] each, the largest first.
        """
        binary = _is_binary(up) and _is_binary(down)
        if not binary:
            may_move = (up[0] > 0) | (down[0] > 0)
            moving = may_move.any(0)
            moving[: self._count] = True  # as many for all groups of channels
            up = up[..., moving]
            down = down[..., moving]
            weight = weight[:, moving]
        inputs = up.shape[2]
        if binary and inputs <= _COMPARED:
            first, number = _distinct(up, down)
            up = up[:, first]
            down = down[:, first]
        else:
            number = torch.arange(up.shape[1], device=up.device)
        per_value = math.ceil(self._count / len(up))
        candidates = _CANDIDATES * (per_value + 1)
        picks = binary and candidates < inputs
        read = inputs
        if picks:  # then whole inputs are read, all rows of them
            read = candidates
            up = up.transpose(1, 2).contiguous().transpose(1, 2)
            down = down.transpose(1, 2).contiguous().transpose(1, 2)
        rises = []
        falls = []
        size = max(1, up.shape[1] * read)
        for rows in torch.split(weight, max(1, _ELEMENTS // size)):
            picked = rows.detach().abs().topk(candidates, 1).indices if picks else None
            rise = self._first(up, down, rows, picked)
            fall = self._first(down, up, rows, picked)
            if picks:
                enough = (rise > 0).all() & (fall > 0).all()
                if not bool(enough):  # others count as well
                    rise = self._first(up, down, rows)
                    fall = self._first(down, up, rows)
            rises.append(self._kept(rise))
            falls.append(self._kept(fall))
        all_rises = torch.cat(rises, 2)
        all_falls = torch.cat(falls, 2)
        return all_rises[:, number], all_falls[:, number]

    def _first(
        self, up: Tensor, down: Tensor, weight: Tensor, picked: Tensor | None = None
    ) -> Tensor:
        """Largest rises [outputs, rows, count] of the sums of :meth:`_largest`, by all inputs or
        those with the numbers ``picked`` [outputs, candidates].
        """
        first_up = up[0]
        first_down = down[0]
        first_weight = weight
        if picked is not None:
            first_up = first_up.T[picked].transpose(1, 2)
            first_down = first_down.T[picked].transpose(1, 2)
            first_weight = weight.gather(1, picked)
        rise = _rise(first_up, first_down, first_weight.unsqueeze(1))
        count = min(self._count, rise.shape[2])
        values, places = rise.topk(count, 2)
        if picked is not None:
            numbers = picked.unsqueeze(1).expand(rise.shape)
            places = numbers.gather(2, places)
        every = [values]
        shape = (*places.shape[:2], up.shape[2])
        # Change p of a value counts only beside the p larger ones of the same value, and beside
        # those of all values with a larger first change.
        for number in range(1, min(len(up), self._count)):
            few = places[..., : self._count - number]
            rises = up[number].expand(shape).gather(2, few)
            falls = down[number].expand(shape).gather(2, few)
            own = weight.unsqueeze(1).expand(shape).gather(2, few)
            every.append(_rise(rises, falls, own))
        return first_changes(torch.cat(every, 2), self.budget, 2)

    def _kept(self, changes: Tensor) -> Tensor:
        """What is kept of changes [outputs, rows, count], [count or 1, rows, outputs]."""
        largest = changes.permute(2, 1, 0)
        if not self.summed:
            return largest
        return _spent(self.budget, largest.unbind(0)).unsqueeze(0)


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

    def _numbers(self) -> range:
        """Of the changes of a value, at least one."""
        return range(1, max(1, self.most) + 1)

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
        return Changes(
            self.budget,
            up=tuple((added >= number).to(frames.dtype) for number in self._numbers()),
            down=tuple((removed >= number).to(frames.dtype) for number in self._numbers()),
            frame=frame_numbers(frames),
            apart=True,
            summed=summed,
        )

    def lowest(self, frames: Tensor, weights: Tensor) -> Tensor:
        """The frames of the ball whose sum with the weights is least; frames may be one for several
        rows of weights.
        """
        frames = frames.expand(weights.shape)
        added, removed = self.reach(frames)
        each = torch.where(weights < 0, -weights, weights * (frames > 0)).flatten(1)
        times = torch.where(weights < 0, added, removed).flatten(1)
        falls = torch.cat([each * (times >= number) for number in self._numbers()], 1)
        count = min(int(self.budget), falls.shape[1])
        values, places = falls.topk(count, 1)
        elements = places % each.shape[1]
        pays = (values > 0).to(each.dtype)
        spent = torch.zeros_like(each).scatter_add(1, elements, pays)
        direction = torch.where(weights < 0, 1.0, -1.0).to(frames.dtype)
        return frames + direction * spent.view_as(weights).to(frames.dtype)


def changed_sums(weights: Tensor, steps: Sequence[Changes]) -> tuple[Tensor, Tensor]:
    """How far sums over time ``sum_t weights[f, t] x[t]`` can rise and fall, [F, *] each.
    时间加权和的变化范围。

    The budget is one for all steps: of the changes of all of them the largest count. They have to
    be of different events in different steps, see :func:`share_frames`.
    """
    rises = []
    falls = []
    for row in weights.tolist():
        up: list[Tensor] = []
        down: list[Tensor] = []
        for weight, step in zip(row, steps, strict=True):
            if weight < 0:
                step = step.opposite()
            up += [abs(weight) * part for part in step.up if weight]
            down += [abs(weight) * part for part in step.down if weight]
        rises.append(_spent_on_largest(steps[0], up))
        falls.append(_spent_on_largest(steps[0], down))
    return torch.stack(rises), torch.stack(falls)


def share_frames(steps: Sequence[Changes]) -> bool:
    """Whether an event may move an element in more than one step."""
    frames = torch.stack([step.frame for step in steps])
    if bool((frames == _SEVERAL).any()):
        return True
    ordered = frames.sort(0).values
    return bool((ordered[1:] == ordered[:-1]).any())


def _spent(budget: float, largest: Sequence[Tensor]) -> Tensor:
    """The sum of so many changes, the largest first."""
    total = torch.zeros_like(largest[0])
    for number, change in enumerate(largest):
        share = min(1.0, budget - number)
        if share <= 0:
            break
        total = total + share * change
    return total


def _spent_on_largest(like: Changes, changes: list[Tensor]) -> Tensor:
    """The sum of the largest changes that the budget allows, of those that are given."""
    if not changes:
        return torch.zeros_like(like.up[0])
    largest = first_changes(torch.stack(changes), like.budget, 0)
    return _spent(like.budget, largest.unbind(0))


def first_changes(changes: Tensor, budget: float, dim: int) -> Tensor:
    """The largest changes along a dimension, as many as the budget pays in part or as a whole."""
    most = max(1, math.ceil(budget))
    count = min(most, changes.shape[dim])
    return changes.topk(count, dim).values


def frame_numbers(frames: Tensor) -> Tensor:
    """The number of the frame of every value."""
    steps = torch.arange(frames.shape[1], device=frames.device)
    return along(steps, 1, frames.ndim).expand(frames.shape)


def frames_of_rows(frame: Tensor) -> Tensor | None:
    """The frame that moves each row of a tensor; None if a row is moved by several."""
    found = _one_of(frame)
    return None if bool((found == _SEVERAL).any()) else found


def _is_binary(changes: Tensor) -> bool:
    """Whether all of them are 0 or 1."""
    return bool(((changes == 0) | (changes == 1)).all())


def _rise(up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """The most by which values that rise by ``up`` or fall by ``down`` raise a weighted sum."""
    rising = at_least(weight, 0.0)
    falling = at_least(-weight, 0.0)
    return up * rising + down * falling


def _distinct(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Places of rows of which no two are the same, and by row which of these it is; of event
    frames most patches are empty. Changes [changes, rows, inputs] are binary, the largest first.
    """
    both = torch.cat([up.sum(0), down.sum(0)], 1)
    times = both.double()
    base = len(up) + 1.0
    digits = int(_EXACT_BITS / math.log2(base))
    every = torch.arange(len(times), device=up.device)
    number = torch.zeros_like(every)
    for part in torch.split(times, digits, 1):
        exponents = torch.arange(part.shape[1], dtype=part.dtype, device=part.device)
        codes = part @ base**exponents
        _, of_part = torch.unique(codes, return_inverse=True)
        of_both = number * len(times) + of_part
        _, number = torch.unique(of_both, return_inverse=True)
    first = torch.zeros_like(every)
    first[number] = every
    count = int(number.max()) + 1
    return first[:count], number


def _in_place(groups: Sequence[Tensor], shape: torch.Size) -> tuple[Tensor, ...]:
    """Values [count, rows * places, outputs] of groups of channels as images [B, C, H, W] each."""
    together = torch.cat(list(groups), 2)
    count, _, outputs = together.shape
    images = together.view(count, shape[0], -1, outputs).transpose(2, 3)
    return images.reshape(count, *shape).unbind()


def _one_of(frame: Tensor) -> Tensor:
    """The frame that all elements of a row [rows, *] are moved by; -1 if it is not one."""
    rows = frame.flatten(1)
    first = rows[:, :1]
    is_one = (rows == first).all(1)
    return torch.where(is_one, first.squeeze(1), _SEVERAL)
