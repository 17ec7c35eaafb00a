"""The largest effect of at most k changed events on the currents of the first layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Changes", "changed_sums", "first_changes", "frames_of_rows", "share_frames"]

_EXACT_BITS = 52
"""Binary values that a number in float64 holds exactly."""

_CANDIDATES = 16
"""Weights that are looked at for each change that counts, the largest ones."""

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
        rising = factor.clamp(min=0)
        falling = (-factor).clamp(min=0)
        up = []
        down = []
        for rise, fall in zip(self.up, self.down, strict=True):
            up.append(rise * rising + fall * falling)
            down.append(rise * falling + fall * rising)
        return replace(self, up=tuple(up), down=tuple(down))

    def falls(self, samples: Tensor, weights: Tensor) -> Tensor:
        """How far weighted sums [R, *] of all elements of samples fall in each of the changes that
        lower them most, [R, changes]; ``samples`` are their numbers [R].
        """
        rising = weights.clamp(min=0)
        falling = (-weights).clamp(min=0)
        every = []
        for up, down in zip(self.up, self.down, strict=True):
            found = rising * down[samples] + falling * up[samples]
            every.append(found.flatten(1))
        return first_changes(torch.cat(every, 1), self.budget, 1)

    def linear(self, weight: Tensor, shape: torch.Size) -> "Changes | None":
        """Of a linear map [outputs, inputs] whose result has this shape."""
        if not self.apart:
            return None
        up = torch.cat([part.flatten(0, -2) for part in self.up], 1)
        down = torch.cat([part.flatten(0, -2) for part in self.down], 1)
        rises, falls = self._largest(up, down, weight.repeat(1, len(self.up)))
        frame = _one_of(self.frame.flatten(0, -2)).unsqueeze(1)
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
            """What the outputs of a group see change, [groups, B * places, changes]."""
            found = []
            for part in parts:
                seen = F.unfold(part, size, dilation, padding, stride)
                by_group = seen.view(len(seen), groups, -1, seen.shape[2]).permute(1, 0, 3, 2)
                found.append(by_group.flatten(1, 2))
            return torch.cat(found, 2)

        kernels = weight.flatten(1).repeat(1, len(self.up)).chunk(groups)
        up: list[Tensor] = []
        down: list[Tensor] = []
        groupwise = zip(patches(self.up), patches(self.down), kernels, strict=True)
        for rises, falls, kernel in groupwise:
            found = self._largest(rises, falls, kernel)
            up.append(found[0])
            down.append(found[1])
        frame = _one_of(self.frame).view(-1, 1, 1, 1)
        return replace(
            self,
            budget=1.0 if self.summed else self.budget,
            up=_in_place(up, shape),
            down=_in_place(down, shape),
            frame=frame.expand(shape),
            apart=False,
        )

    def _largest(self, up: Tensor, down: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Largest rises and falls, [count, rows, outputs] each, of sums of values [rows, inputs]
        that can rise and fall by ``up`` and ``down``, with weights [outputs, inputs].
        """
        binary = all(bool(((part == 0) | (part == 1)).all()) for part in (up, down))
        if not binary:
            moving = ((up > 0) | (down > 0)).any(0)
            moving[: max(1, math.ceil(self.budget))] = True  # as many for all groups of channels
            up = up[:, moving]
            down = down[:, moving]
            weight = weight[:, moving]
        if binary and up.shape[1] <= _EXACT_BITS:
            first, number = _distinct(up, down)
        else:
            first = number = torch.arange(len(up), device=up.device)
        up = up[first]
        down = down[first]
        candidates = _CANDIDATES * (math.ceil(self.budget) + 1)
        picked = binary and candidates < up.shape[1]
        if picked:
            by_input = up.T.contiguous(), down.T.contiguous()
        rises = []
        falls = []
        size = len(up) * (candidates if picked else up.shape[1])
        for rows in torch.split(weight, max(1, _ELEMENTS // max(1, size))):
            found = self._picked(*by_input, rows, candidates) if picked else None
            if found is None:
                found = _rises_and_falls(up, down, rows)
            rises.append(self._kept(found[0]))
            falls.append(self._kept(found[1]))
        return torch.cat(rises, 2)[:, number], torch.cat(falls, 2)[:, number]

    def _picked(
        self, up: Tensor, down: Tensor, weight: Tensor, candidates: int
    ) -> tuple[Tensor, Tensor] | None:
        """Rises and falls by binary values [inputs, rows] with the largest weights; None if not as
        many of them as may change can raise and lower each sum, so that others count as well.
        """
        largest = weight.detach().abs().topk(candidates, 1).indices
        rises = up[largest].transpose(1, 2)
        falls = down[largest].transpose(1, 2)
        found = _rises_and_falls(rises, falls, weight.gather(1, largest))
        enough = [bool(((part > 0).sum(2) >= self.budget).all()) for part in found]
        return found if all(enough) else None

    def _kept(self, changes: Tensor) -> Tensor:
        """Of changes [outputs, rows, inputs] what counts, [count, rows, outputs]."""
        largest = first_changes(changes, self.budget, 2).permute(2, 1, 0)
        if not self.summed:
            return largest
        return _spent(self.budget, largest.unbind(0)).unsqueeze(0)


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
    return _spent(like.budget, first_changes(torch.stack(changes), like.budget, 0).unbind(0))


def first_changes(changes: Tensor, budget: float, dim: int) -> Tensor:
    """The largest changes along a dimension, as many as the budget pays in part or as a whole."""
    count = min(max(1, math.ceil(budget)), changes.shape[dim])
    return changes.topk(count, dim).values


def frames_of_rows(frame: Tensor) -> Tensor | None:
    """The frame that moves each row of a tensor; None if a row is moved by several."""
    found = _one_of(frame)
    return None if bool((found == _SEVERAL).any()) else found


def _rises_and_falls(up: Tensor, down: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """How far values [rows, inputs], or [outputs, rows, inputs], times weights [outputs, inputs]
    can rise and fall.
    """
    rising = weight.clamp(min=0).unsqueeze(1)
    falling = (-weight).clamp(min=0).unsqueeze(1)
    return up * rising + down * falling, up * falling + down * rising


def _distinct(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Places of rows of which no two are the same, and by row which of these it is; of event
    frames most patches are empty. Values are binary, 52 a row at most.
    """
    every = torch.arange(len(up), device=up.device)
    powers = 2.0 ** torch.arange(up.shape[1], dtype=torch.float64, device=up.device)
    rises, of_rise = torch.unique(up.double() @ powers, return_inverse=True)
    _, of_fall = torch.unique(down.double() @ powers, return_inverse=True)
    found, number = torch.unique(of_fall * len(rises) + of_rise, return_inverse=True)
    first = torch.zeros_like(found)
    first[number] = every
    return first, number


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
    return torch.where((rows == first).all(1), first.squeeze(1), _SEVERAL)
