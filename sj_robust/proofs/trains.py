"""The possible spike trains of a neuron whose current is the same in every step."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sj_robust.proofs.rounding import charge_rounding, reset_rounding
from sj_robust.proofs.spiking import Interval, Spiking

__all__ = ["Chain", "Trains", "possible_trains"]

_MOST = 2048
"""Trains of a layer; with more of them chains are not used."""


@dataclass(frozen=True)
class Trains:
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

    def at(self, index: Tensor) -> "Chain":
        """Some of the neurons."""
        return Chain(self.spikes, self.first[index], self.last[index])

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
    spiking: Spiking, T: int, *, largest: float, error: float, device: torch.device
) -> Trains | None:
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
    return Trains(
        low=tensor([piece.low for piece in pieces]),
        high=tensor([piece.high for piece in pieces]).cummax(0).values,
        spikes=tensor([piece.train for piece in pieces]),
    )


def _after_step(charged: _Piece, spiking: Spiking) -> list[_Piece]:
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
