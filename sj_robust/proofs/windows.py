"""The possible spike trains of a spiking layer given its bounds, and weighted sums over them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sj_robust.ops.limits import by_sign
from sj_robust.ops.trains.config import BoundsBackend, Constants, StepBounds, Trains, Windows
from sj_robust.ops.trains.reference import train_sums
from sj_robust.proofs.rounding import charge_rounding, reset_rounding, within_float32
from sj_robust.proofs.spiking import Centred, Float32Spiking, Interval, SpikingBounds

__all__ = [
    "KEPT",
    "Chain",
    "KeptStep",
    "ListedTrains",
    "Memory",
    "SpikeTrains",
    "Steps",
    "check_finite",
    "constants_of",
    "in_float32",
    "kept_steps",
    "possible_trains",
    "stacked",
    "weighted_sums",
]

KEPT = 8
"""Windows of a step that are told apart: the latest ones, beside the one without any reset. All
between them are one, so that the cost is linear in the number of steps.
"""


def weighted_sums(weights: Tensor, parts: Interval) -> Interval:
    """Bounds of ``sum_t weights[f, t] x[t]`` if every step is bounded alone: [F, *] for parts
    [T, *].
    """
    up, down = by_sign(weights)
    shape = parts.low.shape[1:]
    flat = parts.each(lambda end: end.flatten(1))
    least = up @ flat.low + down @ flat.high
    most = up @ flat.high + down @ flat.low
    sums = Interval(least, most)
    return sums.each(lambda end: end.view(-1, *shape))


class Steps:
    """Values that are bounded step by step, [T, N, *], such as those of a max pooling."""

    def __init__(self, values: Interval) -> None:
        """Of all steps."""
        self.values = values

    def bounds(self, weights: Tensor) -> Interval:
        """Bounds of ``sum_t weights[f, t] x[t]``, [F, N, *]."""
        steps = weights.shape[1]
        return weighted_sums(weights, self.values.each(lambda end: end[:steps]))

    def centred(self, weights: Tensor) -> Centred:
        """See :class:`SpikeTrains`."""
        return Centred.of(self.bounds(weights))


def in_float32(values: Interval, slack: float) -> Centred:
    """Centres and radii in float32 of the values of an interval in float64; the radii cover what
    that rounds, and float64's own rounding by the factor ``slack``.
    """
    centre = (values.low + values.high).div_(2)
    radius = (values.high - values.low).div_(2).mul_(slack)
    rounded = centre.float()
    lost = centre.sub_(rounded).abs_()
    return Centred(rounded, radius.add_(lost).mul_(slack).float())


def constants_of(spiking: Float32Spiking, steps: int) -> Constants:
    """What an operator has to know of a neuron in its first steps, and of what float32 rounds."""
    return Constants(
        decay=spiking.charging.decay_value,
        gains=tuple(spiking.gain_at(t) for t in range(steps)),
        rest=spiking.rest,
        threshold=spiking.threshold,
        above=spiking.above,
        below=spiking.below,
        soft=spiking.soft,
        charge_unit=charge_rounding(1.0),
        charge_least=charge_rounding(0.0),
        reset_unit=reset_rounding(1.0, 0.0, 0.0),
        reset_least=reset_rounding(0.0, 0.0, 0.0),
    )


def check_finite(x: Interval, constants: Constants) -> None:
    """Raise NoBoundsError if currents or potentials may not be finite in float32."""
    gain = max(map(abs, constants.gains))
    size = x.size().max() * gain * len(constants.gains) + abs(constants.rest)
    within_float32(constants.of_charge(size + abs(constants.threshold)))


class SpikeTrains:
    """The trains of a spiking layer: paths through the cases stay and fire, over the last reset; or
    those of a :class:`Chain`, if the current is the same in every step. 脉冲层可能的脉冲序列。

    See :func:`sj_robust.ops.trains.reference.path_sums`.

    Attributes:
        spikes: Bounds of the spikes of every step so far.
        open: Numbers of the neurons that have cases, [O]; the spikes of the others are decided.
        sure_cases: Of these, [T, O]; see :class:`sj_robust.ops.trains.config.StepBounds`.
        possible_cases: Likewise.
        chain: Trains of a constant current.
        backend: What computes the sums of a layer in training.
    """

    backend: BoundsBackend = "auto"

    def __init__(self, windows: Windows) -> None:
        """No step yet."""
        self.windows = windows
        self.spikes: list[Interval] = []
        self.open = torch.empty(0, dtype=torch.int64)
        self.sure_cases = torch.empty(0, 0, dtype=torch.int16)
        self.possible_cases = self.sure_cases
        self.chain: Chain | None = None
        self._packed: Trains | None = None

    @property
    def steps(self) -> int:
        """Time steps so far."""
        return len(self.spikes)

    def bounds(self, weights: Tensor) -> Interval:
        """Bounds of ``sum_t weights[f, t] s[t]``, [F, N, *], of the steps that have weights."""
        trains = self._packed_steps(weights.shape[1])
        low, high = train_sums(weights, trains, self.windows)
        shape = self.spikes[0].low.shape
        return Interval(low.view(-1, *shape), high.view(-1, *shape))

    def centred(self, weights: Tensor) -> Centred:
        """Centres and radii of the same instead of both ends."""
        return Centred.of(self.bounds(weights))

    def _packed_steps(self, steps: int) -> Trains:
        if self._packed is None or len(self._packed.sure) != steps:
            spikes = stacked(self.spikes[:steps])
            spikes = spikes.each(lambda end: end.flatten(1))
            undecided = (spikes.low != spikes.high).any(0)
            place = torch.full(undecided.shape, -1, dtype=torch.int32, device=undecided.device)
            number = torch.arange(len(self.open), dtype=torch.int32, device=undecided.device)
            place[self.open] = number
            chain = self.chain
            self._packed = Trains(
                sure=spikes.low,
                possible=spikes.high,
                place=place.masked_fill(~undecided, -1),
                sure_cases=self.sure_cases,
                possible_cases=self.possible_cases,
                spikes=None if chain is None else chain.spikes,
                first=None if chain is None else chain.first,
                last=None if chain is None else chain.last,
            )
        return self._packed


def stacked(steps: Sequence[Interval]) -> Interval:
    """Bounds of several steps as those of one tensor."""
    low = torch.stack([step.low for step in steps])
    high = torch.stack([step.high for step in steps])
    return Interval(low, high)


@dataclass(frozen=True)
class KeptStep:
    """Bounds of one step of a layer.

    Attributes:
        h: Of the charged potential.
        spikes: Of the spikes.
        v: Of the potential after the reset.
    """

    h: Interval
    spikes: Interval
    v: Interval


def kept_steps(found: StepBounds, shape: torch.Size) -> list[KeptStep]:
    """Bounds of steps [T, M] one by one, each in the shape of a step."""
    pairs = (
        Interval(found.h_low, found.h_high),
        Interval(found.sure, found.possible),
        Interval(found.v_low, found.v_high),
    )
    h, spikes, v = [pair.each(lambda end: end.view(-1, *shape)) for pair in pairs]
    rows = zip(h.steps(), spikes.steps(), v.steps(), strict=True)
    return [KeptStep(*row) for row in rows]


@dataclass
class Memory:
    """What the calls of a layer leave each other.

    Attributes:
        trains: The trains so far.
        currents: Bounds in exact arithmetic of every step's current, [N, *].
        rounded: The same with what float32 rounds.
        errors: How far float32's current can be from the exact one, [N, *], by step.
        known: Bounds of spikes from elsewhere, by step; empty if none is known.
        sums: Bounds of sums of windows, of the open neurons, by call.
        summed: Which windows these are.
        steps: What every step gave, [N, *].
        error: How far float32's current can be from the exact one, at most.
    """

    trains: SpikeTrains
    currents: list[Interval] = field(default_factory=list)
    rounded: list[Interval] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    known: list[Interval] = field(default_factory=list)
    sums: list[Interval] = field(default_factory=list)
    summed: list[tuple[int, int]] = field(default_factory=list)
    steps: list[KeptStep] = field(default_factory=list)
    error: float = 0.0


_MOST = 2048
"""ListedTrains of a layer; with more of them chains are not used."""


@dataclass(frozen=True)
class ListedTrains:
    """Every spike train of a neuron, in the order of the currents that can cause it.

    Attributes:
        low: Smallest current of each train, ascending [J].
        high: Largest one, ascending [J]; currents of neighbours overlap by what float32 rounds.
        spikes: The trains, [J, T].
    """

    low: Tensor
    high: Tensor
    spikes: Tensor

    def chain(self, current: Interval) -> "Chain":
        """The trains that are possible for currents of neurons [M]."""
        first = torch.searchsorted(self.high, current.low.contiguous())
        last = torch.searchsorted(self.low, current.high.contiguous(), right=True) - 1
        return Chain(self.spikes, first, last)


@dataclass(frozen=True)
class Chain:
    """For each of M neurons the trains ``spikes[first], ..., spikes[last]``."""

    spikes: Tensor
    first: Tensor
    last: Tensor

    def bounds(self, weights: Tensor) -> Interval:
        """Least and largest ``sum_t weights[f, t] s[t]``, [F, M]; of the first steps if the weights
        are of fewer.

        The least of a range is that of two ranges of 2**k trains that cover it, which a table
        holds for all k.
        """
        values = weights @ self.spikes[:, : weights.shape[1]].T
        width = self.last - self.first + 1
        level = torch.log2(width.double()).long()
        second = self.last + 1 - 2**level
        ends = []
        for pick in (torch.minimum, torch.maximum):
            table = [values]
            levels = int(level.max()) if level.numel() else 0
            for k in range(levels):
                before = table[-1]
                shifted = before.roll(-(2**k), 1)  # what comes round is not asked for
                table.append(pick(before, shifted))
            flat = torch.cat(table, 1)
            start = level * values.shape[1]
            one = flat[:, start + self.first]
            other = flat[:, start + second]
            ends.append(pick(one, other))
        return Interval(ends[0], ends[1])


@dataclass(frozen=True)
class _Piece:
    """Currents I that can give the same train so far: ``v = rest + slope I + offset -+ drift``.

    Attributes:
        low: Smallest current.
        high: Largest.
        slope: See above.
        offset: See above.
        drift: How far float32's potential can be from the charge equation.
        size: Largest absolute potential.
        train: Spikes so far.
    """

    low: float
    high: float
    slope: float
    offset: float
    drift: float
    size: float
    train: tuple[float, ...]

    def cut(self, threshold: float, *, above: bool) -> "_Piece | None":
        """The currents whose potential can be at least, or at most, so far above rest; None if
        there are none.
        """
        needed = threshold - self.offset + (-self.drift if above else self.drift)
        if self.slope == 0:
            reached = needed <= 0 if above else needed >= 0
            return self if reached else None
        end = needed / self.slope
        found = self
        if above == (self.slope > 0):
            found = replace(self, low=max(self.low, end))
        else:
            found = replace(self, high=min(self.high, end))
        return found if found.low <= found.high else None


def possible_trains(
    spiking: SpikingBounds, T: int, *, largest: float, error: float, device: torch.device
) -> ListedTrains | None:
    """All trains of a neuron for a constant current, and the currents that can give each of them.
    恒定电流下所有可能的脉冲序列。

    While the train so far is fixed, the potential is an affine function of the current, so that a
    step cuts its piece of currents once at most::

        h = lambda (slope I + offset) + p[t] I,    spike: h >= threshold

    The current may be rounded differently in every step, and so may the potential: a piece has all
    currents for which its train is possible whatever is rounded, and where two cuts are closer
    than that, the trains between them are pieces of their own.

    Args:
        spiking: The neuron, with the margin of its threshold.
        T: Time steps.
        largest: Largest absolute current.
        error: How far float32's current can be from the exact one.
        device: Of the result.

    Returns:
        None if there are more than 2048 trains.
    """
    rest = spiking.rest
    decay = spiking.charging.decay_value
    whole = _Piece(
        low=-math.inf,
        high=math.inf,
        slope=0.0,
        offset=0.0,
        drift=0.0,
        size=abs(rest),
        train=(),
    )
    pieces = [whole]
    for t in range(T):
        gain = spiking.gain_at(t)
        now = []
        for piece in pieces:
            terms = piece.size + abs(gain) * largest + abs(rest)
            rounded = charge_rounding(terms)
            charged = replace(
                piece,
                slope=decay * piece.slope + gain,
                offset=decay * piece.offset,
                drift=decay * piece.drift + abs(gain) * error + rounded,
                size=decay * piece.size + abs(gain) * largest + abs((1 - decay) * rest) + rounded,
            )
            now += _after_step(charged, spiking)
        pieces = now
        if len(pieces) > _MOST:
            return None
    pieces.sort(key=lambda piece: (piece.low, piece.high))
    tensor = partial(torch.tensor, dtype=torch.float64, device=device)
    return ListedTrains(
        low=tensor([piece.low for piece in pieces]),
        high=tensor([piece.high for piece in pieces]).cummax(0).values,
        spikes=tensor([piece.train for piece in pieces]),
    )


def _after_step(charged: _Piece, spiking: SpikingBounds) -> list[_Piece]:
    """What is left of a piece where the neuron stays silent, and where it fires."""
    found = []
    rest = spiking.rest
    rounded = reset_rounding(charged.size, rest, spiking.threshold)
    silent = charged.cut(spiking.above - rest, above=False)
    if silent is not None:
        found.append(
            replace(
                silent,
                drift=silent.drift + rounded,
                size=silent.size + rounded,
                train=(*silent.train, 0.0),
            )
        )
    fired = charged.cut(spiking.below - rest, above=True)
    if fired is None:
        return found
    train = (*fired.train, 1.0)
    if spiking.soft:
        offset = fired.offset - spiking.threshold
        size = fired.size + abs(spiking.threshold) + rounded
        drift = fired.drift + rounded
        found.append(replace(fired, offset=offset, drift=drift, size=size, train=train))
    else:
        size = abs(rest) + rounded
        found.append(replace(fired, slope=0.0, offset=0.0, drift=rounded, size=size, train=train))
    return found
