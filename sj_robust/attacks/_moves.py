"""Small moves of an image that a search proposes: elements, patches, parts of another image, spikes
of the first layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sj_robust.attacks._first_spikes import FirstSpikes

__all__ = ["FLIPS", "MOVES", "Moves", "Place"]

_MOST = 3  # elements that one move sets
_CANDIDATES = 12  # neurons out of which one is flipped
_LARGEST_EXPONENT = 0.7  # the largest patch has the side min(H, W) ** 0.7
_ACROSS = 1e-5  # how far beyond a threshold a current is carried
_PROJECTIONS = 3


@dataclass(frozen=True)
class Place:
    """Where chains are, and where they may go.

    Attributes:
        x: Their images, [n, P].
        low: Least values that their elements may have, [n, P].
        high: Largest ones, [n, P].
        slope: What a unit of every element is believed to change of the margin, [n, P].
        rows: Their samples, [n].
        pool: Images that were found for every sample before, [N, S, P].
    """

    x: Tensor
    low: Tensor
    high: Tensor
    slope: Tensor
    rows: Tensor
    pool: Tensor

    def repeated(self, times: int) -> "Place":
        """Every chain repeated, one copy after the other."""
        if times == 1:
            return self
        return Place(
            x=self.x.repeat_interleave(times, 0),
            low=self.low.repeat_interleave(times, 0),
            high=self.high.repeat_interleave(times, 0),
            slope=self.slope.repeat_interleave(times, 0),
            rows=self.rows.repeat_interleave(times),
            pool=self.pool,
        )


class Moves:
    """Proposals for images of one shape and one network.

    Args:
        shape: Channels, height and width, whose product is P.
        spikes: What is known of the first spiking layer, which flips need.
    """

    def __init__(self, shape: tuple[int, int, int], spikes: FirstSpikes | None) -> None:
        """See the class."""
        self.shape = shape
        self.spikes = spikes

    def numbers(self, kind: str) -> int:
        """How many random numbers a move of a kind takes."""
        return sum(self._widths(kind))

    def _widths(self, kind: str) -> list[int]:
        """How a move of a kind splits them."""
        channels = self.shape[0]
        return {
            "elements": [_MOST, _MOST, 1, 1],
            "patch": [1, 2, 1, 1, channels, channels],
            "cross": [1, 2, 1],
            "flip": [_CANDIDATES, _CANDIDATES],
            "guided_flip": [_CANDIDATES, _CANDIDATES],
        }[kind]

    def propose(self, kind: str, place: Place, numbers: Tensor) -> Tensor:
        """Images [n, P]; ``numbers`` are uniform in [0, 1), [n, :meth:`numbers`]."""
        return MOVES[kind](self, place, numbers)

    def elements(self, place: Place, numbers: Tensor) -> Tensor:
        """One to three elements get new values, every second time the extreme ones."""
        index, share, many, extreme = torch.split(numbers, self._widths("elements"), dim=1)
        count = 1 + _integers(many, _MOST)
        used = torch.arange(_MOST, device=many.device) % count
        index = _integers(index, place.x.shape[1]).gather(1, used)
        share = _rounded(share, extreme).gather(1, used).to(place.x.dtype)
        low = place.low.gather(1, index)
        high = place.high.gather(1, index)
        value = low + share * (high - low)
        return place.x.scatter(1, index, value)

    def patch(self, place: Place, numbers: Tensor) -> Tensor:
        """A square, mostly of one pixel, gets a value per channel, in all channels or in some."""
        _, height, width = self.shape
        parts = torch.split(numbers, self._widths("patch"), dim=1)
        side, corner, all_channels, extreme, share, channel = parts
        power = side.squeeze(1) ** 3 * _LARGEST_EXPONENT
        pixels = (min(height, width) ** power).long()
        inside = self._square(pixels, corner)
        painted = (channel < 0.5) | (all_channels < 0.5)
        mask = (inside & painted[:, :, None, None]).flatten(1)
        per_channel = _rounded(share, extreme)
        share = per_channel.repeat_interleave(height * width, 1).to(place.x.dtype)
        value = place.low + share * (place.high - place.low)
        return torch.where(mask, value, place.x)

    def cross(self, place: Place, numbers: Tensor) -> Tensor:
        """A square of another image that was found for the sample."""
        _, height, width = self.shape
        side, corner, which = torch.split(numbers, self._widths("cross"), dim=1)
        longest = max(min(height, width) - 1, 1)
        pixels = 1 + _integers(side.squeeze(1), longest)
        square = self._square(pixels, corner)
        mask = square.expand(-1, *self.shape).flatten(1)
        found = _integers(which.squeeze(1), place.pool.shape[1])
        other = place.pool[place.rows, found]
        return torch.where(mask, other, place.x)

    def flip(self, place: Place, numbers: Tensor) -> Tensor:
        """Among some neurons, the one nearest to its next threshold is carried across it."""
        return self._flipped(place, numbers, believed=False)

    def guided_flip(self, place: Place, numbers: Tensor) -> Tensor:
        """Among some neurons, the most promising one is carried across its next threshold."""
        return self._flipped(place, numbers, believed=True)

    def _flipped(self, place: Place, numbers: Tensor, *, believed: bool) -> Tensor:
        """The smallest L2 move that carries the current of a neuron across a threshold."""
        spikes = self.spikes
        if spikes is None:
            raise ValueError("flips need a first spiking layer whose thresholds are known")
        neuron, side = numbers.chunk(2, dim=1)
        neuron = _integers(neuron, spikes.neurons)
        index = spikes.index[neuron]
        weight = spikes.weight[neuron]
        bias = spikes.bias[neuron]
        current = (_at(place.x, index) * weight).sum(2) + bias
        next_above = torch.bucketize(current, spikes.thresholds, right=True)
        up = spikes.thresholds[next_above] + _ACROSS
        down = spikes.thresholds[next_above - 1] - _ACROSS
        if believed:
            along_weight = (_at(place.slope, index) * weight).sum(2)
            slope = along_weight / weight.square().sum(2)
            goal = torch.where(slope < 0, up, down)
            distance = (goal - current).abs()
            cost = distance / (slope.abs() + 1e-9)
        else:
            goal = torch.where(side < 0.5, up, down)
            distance = (goal - current).abs()
            cost = distance
        goal = torch.where(distance.isinf(), current, goal)
        cheapest = cost.argmin(1, keepdim=True)
        row = cheapest.unsqueeze(2).expand(-1, 1, index.shape[2])
        return _carried(
            place,
            index=index.gather(1, row).squeeze(1),
            weight=weight.gather(1, row).squeeze(1),
            goal=(goal - bias).gather(1, cheapest),
        )

    def _square(self, side: Tensor, corner: Tensor) -> Tensor:
        """Which pixels lie in a square of a side [n] at a random place, [n, 1, H, W] bool."""
        _, height, width = self.shape
        rows = _interval(side, corner[:, 0], height)
        columns = _interval(side, corner[:, 1], width)
        return rows[:, None, :, None] & columns[:, None, None, :]


MOVES: dict[str, Callable[[Moves, Place, Tensor], Tensor]] = {
    "elements": Moves.elements,
    "patch": Moves.patch,
    "cross": Moves.cross,
    "flip": Moves.flip,
    "guided_flip": Moves.guided_flip,
}
"""All kinds of moves by name."""

FLIPS = ("flip", "guided_flip")
"""Those that need thresholds of the first spiking layer."""


def _carried(place: Place, index: Tensor, weight: Tensor, goal: Tensor) -> Tensor:
    """Images in which the sum of ``weight`` times the elements ``index`` [n, K] is ``goal`` [n, 1].

    Projections onto that plane; elements at the border of the box stay, so that others move more.
    """
    before = place.x.gather(1, index)
    low = place.low.gather(1, index)
    high = place.high.gather(1, index)
    value = before
    for _ in range(_PROJECTIONS):
        missing = goal - (weight * value).sum(1, keepdim=True)
        rises = weight * missing > 0
        free = torch.where(rises, value < high, value > low)
        way = weight * free
        length = way.square().sum(1, keepdim=True).clamp(min=1e-12)
        moved = value + way * (missing / length)
        value = torch.minimum(torch.maximum(moved, low), high)
    change = torch.where(weight == 0, 0.0, value - before)  # rows are filled up with zeros
    return place.x.scatter_add(1, index, change)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Elements ``index`` [n, m, K] of ``x`` [n, P]."""
    return x.gather(1, index.flatten(1)).view_as(index)


def _integers(numbers: Tensor, count: int) -> Tensor:
    """Uniform in {0, ..., count - 1}, of numbers uniform in [0, 1)."""
    return (numbers * count).long().clamp(max=count - 1)


def _rounded(numbers: Tensor, extreme: Tensor) -> Tensor:
    """The numbers, or where ``extreme`` [n, 1] is below 1/2 the nearer one of 0 and 1."""
    return torch.where(extreme < 0.5, numbers.round(), numbers)


def _interval(side: Tensor, number: Tensor, size: int) -> Tensor:
    """Which of ``size`` places lie in an interval of a length [n] at a random place, [n, size]."""
    first = (number * (size - side + 1)).long()
    end = first + side
    place = torch.arange(size, device=side.device)
    return (place >= first[:, None]) & (place < end[:, None])
