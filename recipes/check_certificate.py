"""Check a certificate of a spiking network's proofs, with numpy and Python alone.

The file says: for each of these images, every image in [0, 1] that differs by at most eps in every
pixel gets the given label from this network, run in float32 in any order of summation. Nothing in
the file is trusted: all bounds are computed here from weights, images, labels and eps, with
whatever float32 and float64 round. docs/concepts/joint.md derives the bounds. Assumed: rounding to
nearest, sums of products (no TF32, no Winograd), and matrix products of numpy likewise.

A certificate whose network is changed is one of another network: the SHA-256 that is shown names
the network, and `Verification.save_certificate` returned it.

The exit code is 0 if every image is accepted, 1 if one is refused, and 2 if the file is no
certificate.

Examples:
    python recipes/check_certificate.py proofs.npz
    python recipes/check_certificate.py proofs.npz --network 5f3c...  # must be this network
"""

import argparse
import hashlib
import json
import math
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Ends = tuple[Array, Array]
"""Smallest and largest values."""

FORMAT = "sj_robust certificate 1"
SAMPLES = 2
"""Images in the batch that the operations of the file were recorded with."""

SMALLEST = 2.0**-126
"""Below it float32 may flush to zero."""

SURPLUS = 1.000001
"""Factor of float32's errors. What it adds is more than 2**-42 of the same sizes, thousands of
roundings of float64, so that it covers those of the formulas beside them."""

ROUNDED = 2.0**-40
"""Relative error that no chain of some hundred operations in float64 on values of one sign has."""

LARGEST = 2.0**76
MOST_STEPS = 32
MOST_TRAINS = 4096
BATCH = 50


class CertificateError(Exception):
    """The file is no certificate, or one of something that this program does not know."""


class RefusedError(Exception):
    """Nothing can be said of these images."""


def gamma(terms: int) -> float:
    """Relative error of a float32 sum of so many products in any order: n u / (1 - n u)."""
    return SURPLUS * terms * 2.0**-24 / (1.0 - terms * 2.0**-24)


def of_charge(size: Any) -> Any:
    """How far float32's ``decay v + gain x + (1 - decay) v_reset`` can be from the exact one."""
    return gamma(16) * size + 16 * SMALLEST


def of_reset(size: Any) -> Any:
    """How far float32's potential after the reset can be from the exact one."""
    return gamma(4) * size + 4 * SMALLEST


def within_float32(size: Array) -> Array:
    """Values that float32 can have, NaN excluded."""
    if not (np.abs(size) <= LARGEST).all():
        raise RefusedError("values that are not finite, or may be beyond 1e22")
    return size


@dataclass(frozen=True)
class Map:
    """``A x + b``, the same for every row of x [rows, *].

    Attributes:
        times: ``A x``, or with True ``|A| x``.
        shift: b, broadcast to the result.
        shift_size: Sum of the absolute values of what b is computed from.
        terms: Number of terms of a sum, for its rounding.
    """

    times: Callable[[Array, bool], Array]
    shift: Array
    shift_size: Array
    terms: int

    def exact(self, x: "Ball", factor: Array, size: Array) -> "Ball":
        """``A x + factor b`` of each row in exact arithmetic, with a factor that is itself at most
        MOST_STEPS roundings of its size away from the exact one.

        Equation, with d some times what float64 rounds of so many terms::

            centre' = A centre + factor b
            radius' = |A| (radius + d (|centre| + radius)) + d (size |b| + |centre'|)
        """
        d = 2.0**-50 * (self.terms + MOST_STEPS + 8)
        centre = self.times(x.centre, False)
        by_row = (-1, *[1] * (centre.ndim - 1))
        centre = centre + factor.reshape(by_row) * self.shift
        spread = self.times(x.radius + d * (np.abs(x.centre) + x.radius), True)
        rounding = d * (size.reshape(by_row) * self.shift_size + np.abs(centre))
        return Ball(centre, spread + rounding + 2.0**-900)

    def error(self, x: "Ball", error: Array) -> Array:
        """How far float32's result can be from the exact one, for values that are as far."""
        size = np.abs(x.centre) + x.radius
        growth = gamma(self.terms)
        of_sums = self.times(error + growth * (size + error), True)
        found = of_sums + 2 * growth * self.shift_size + self.terms * SMALLEST
        return within_float32((1 + ROUNDED * self.terms) * found)


@dataclass(frozen=True)
class Ball:
    """All values within ``radius`` of ``centre``, element by element."""

    centre: Array
    radius: Array

    def ends(self) -> Ends:
        """Smallest and largest values."""
        below = np.nextafter(self.centre - self.radius, -np.inf)
        return below, np.nextafter(self.centre + self.radius, np.inf)


def ball(low: Array, high: Array) -> Ball:
    """The values between two ends."""
    centre = (low + high) / 2
    radius = np.maximum(high - centre, centre - low)
    return Ball(centre, np.nextafter(radius, np.inf))


def through(maps: list[Map], x: Ball, factor: Array, size: Array) -> Ball:
    """Several maps, see :meth:`Map.exact`."""
    for one in maps:
        x = one.exact(x, factor, size)
    return x


def with_errors(maps: list[Map], x: Ball, error: Array) -> tuple[Ball, Array]:
    """Exact values behind several maps, and what float32 rounds."""
    once = np.ones(len(x.centre))
    for one in maps:
        error, x = one.error(x, error), one.exact(x, once, once)
    return x, error


def patches(x: Array, size: tuple[int, int], stride: list[int], dilation: list[int]) -> Array:
    """What each output of a convolution sees, [rows, C, height, width, *size]."""
    reach = tuple((k - 1) * d + 1 for k, d in zip(size, dilation, strict=True))
    every = np.lib.stride_tricks.sliding_window_view(x, reach, axis=(2, 3))
    return every[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def convolution(weight: Array, bias: Array, given: dict[str, Any]) -> Map:
    """Of [rows, C, H, W]."""
    stride, padding, dilation = given["stride"], given["padding"], given["dilation"]
    size = weight.shape[2:]
    kernels = np.split(weight.reshape(len(weight), -1), given["groups"])

    def times(x: Array, absolute: bool) -> Array:
        sides = ((0, 0), (0, 0), (padding[0], padding[0]), (padding[1], padding[1]))
        found = []
        for part, kernel in zip(np.split(np.pad(x, sides), len(kernels), 1), kernels, strict=True):
            seen = patches(part, size, stride, dilation).transpose(0, 2, 3, 1, 4, 5)
            rows = seen.reshape(*seen.shape[:3], -1)
            found.append(rows @ (np.abs(kernel) if absolute else kernel).T)
        return np.concatenate(found, -1).transpose(0, 3, 1, 2)

    shift = bias.reshape(-1, 1, 1)
    return Map(times, shift, np.abs(shift), weight[0].size + 2)


def linear(weight: Array, bias: Array) -> Map:
    """Of [rows, *, features]."""

    def times(x: Array, absolute: bool) -> Array:
        return np.asarray(x @ (np.abs(weight) if absolute else weight).T)

    return Map(times, bias, np.abs(bias), weight.shape[1] + 2)


def batch_norm(mean: Array, variance: Array, weight: Array, bias: Array, eps: float) -> Map:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` of channels [rows, C, H, W]."""
    if not (variance + eps > 0).all():
        raise CertificateError("a batch norm must have variances above -eps")
    slope = (weight / np.sqrt(variance + eps)).reshape(-1, 1, 1)
    of_mean = mean.reshape(-1, 1, 1) * slope
    shift = bias.reshape(-1, 1, 1)

    def times(x: Array, absolute: bool) -> Array:
        return np.asarray(x * (np.abs(slope) if absolute else slope))

    return Map(times, shift - of_mean, np.abs(shift) + np.abs(of_mean), 12)


def average(size: list[int], stride: list[int]) -> Map:
    """Average pooling of [rows, C, H, W]."""
    count = size[0] * size[1]

    def times(x: Array, absolute: bool) -> Array:
        return np.asarray(patches(x, (size[0], size[1]), stride, [1, 1]).sum((-1, -2)) / count)

    return Map(times, np.zeros(()), np.zeros(()), count + 2)


@dataclass(frozen=True)
class Neurons:
    """A spiking layer: ``h = decay v + gains[t] x + (1 - decay) rest``; it fires where ``h >=
    threshold``, and then v is rest, or h - threshold if soft. It starts at rest.
    """

    decay: float
    gains: tuple[float, ...]
    threshold: float
    rest: float
    soft: bool

    @property
    def above(self) -> float:
        """From here on float32 fires, whatever it rounds of the threshold."""
        return self.threshold + SURPLUS * 2.0**-24 * abs(self.threshold)

    @property
    def below(self) -> float:
        """Below it does not."""
        return self.threshold - SURPLUS * 2.0**-24 * abs(self.threshold)


@dataclass(frozen=True)
class Trains:
    """What is known of a layer's spikes.

    Attributes:
        sure: 1 where there is a spike for sure, [T, N, *].
        possible: 1 where there may be one.
        joint: Bounds of ``sum_t weights[f, t] s[t]``, [F, N, *], that hold over time.
    """

    sure: Array
    possible: Array
    joint: Callable[[Array], Ends]

    def sums(self, weights: Array) -> Ball:
        """The same, cut off where single steps say more."""
        low, high = self.joint(weights)
        up, down = np.maximum(weights, 0), np.minimum(weights, 0)
        least = np.tensordot(up, self.sure, 1) + np.tensordot(down, self.possible, 1)
        most = np.tensordot(up, self.possible, 1) + np.tensordot(down, self.sure, 1)
        rounding = ROUNDED * np.abs(weights).sum(1).reshape(-1, *[1] * (low.ndim - 1))
        return ball(np.maximum(low, least) - rounding, np.minimum(high, most) + rounding)


@dataclass(frozen=True)
class Piece:
    """Currents I in [low, high] with one train so far: ``v = rest + slope I + offset -+ drift``."""

    low: Fraction | float
    high: Fraction | float
    slope: Fraction
    offset: Fraction
    drift: Fraction
    size: Fraction
    train: tuple[int, ...]

    def cut(self, reached: Fraction, *, above: bool) -> "Piece | None":
        """The currents whose potential above rest can be at least, or at most, so much."""
        needed = reached - self.offset + (-self.drift if above else self.drift)
        if self.slope == 0:
            return self if (needed <= 0 if above else needed >= 0) else None
        end = needed / self.slope
        if above == (self.slope > 0):
            found = replace(self, low=max(self.low, end))
        else:
            found = replace(self, high=min(self.high, end))
        return found if found.low <= found.high else None


def listed_trains(neurons: Neurons, largest: float, error: float) -> list[Piece] | None:
    """All trains for constant currents up to ``largest``, of which float32 sees another one in
    every step that is at most ``error`` away; None if there are too many. Exact arithmetic.
    """
    decay, rest = Fraction(neurons.decay), Fraction(neurons.rest)
    threshold, current = Fraction(neurons.threshold), Fraction(largest)
    nothing = Fraction(0)
    pieces = [Piece(-math.inf, math.inf, nothing, nothing, nothing, abs(rest), ())]
    unit_of_charge, unit_of_reset = Fraction(gamma(16)), Fraction(gamma(4))
    least = 16 * Fraction(SMALLEST)
    for gain in map(Fraction, neurons.gains):
        now: list[Piece] = []
        for piece in pieces:
            terms = decay * piece.size + abs(gain) * current + abs(rest) + abs(decay * rest)
            rounded = unit_of_charge * (terms + piece.size) + least
            size = terms + rounded
            of_reset = unit_of_reset * (size + abs(rest) + abs(threshold)) + least
            charged = replace(
                piece,
                slope=decay * piece.slope + gain,
                offset=decay * piece.offset,
                drift=decay * piece.drift + abs(gain) * Fraction(error) + rounded,
                size=size + of_reset,
            )
            silent = charged.cut(Fraction(neurons.above) - rest, above=False)
            if silent is not None:
                drift = silent.drift + of_reset
                now.append(replace(silent, drift=drift, train=(*piece.train, 0)))
            fired = charged.cut(Fraction(neurons.below) - rest, above=True)
            if fired is not None and neurons.soft:
                fired = replace(
                    fired,
                    offset=fired.offset - threshold,
                    drift=fired.drift + of_reset,
                    size=fired.size + abs(threshold),
                )
            elif fired is not None:
                fired = replace(fired, slope=nothing, offset=nothing, drift=of_reset)
                fired = replace(fired, size=abs(rest) + of_reset)
            if fired is not None:
                now.append(replace(fired, train=(*piece.train, 1)))
        pieces = now
        if len(pieces) > MOST_TRAINS:
            return None
    return sorted(pieces, key=lambda piece: (piece.low, piece.high))


def outward(value: Fraction | float, towards: float) -> float:
    """A number in float64 that is not on the inner side of a value."""
    try:
        return math.nextafter(float(value), towards)
    except OverflowError:
        return towards


def chain(neurons: Neurons, current: Ball, error: Array) -> Trains | None:
    """Spikes for a current [N, *] that is the same in every step; None for too many trains."""
    low, high = current.ends()
    off = float(error.max())
    largest = outward(max(np.abs(low).max(), np.abs(high).max()) + off, math.inf)
    pieces = listed_trains(neurons, largest, off)
    if pieces is None:
        return None
    trains = np.array([piece.train for piece in pieces], dtype=float)
    starts = np.array([outward(piece.low, -math.inf) for piece in pieces])
    stops = np.maximum.accumulate([outward(piece.high, math.inf) for piece in pieces])
    first = np.searchsorted(stops, low)
    last = np.searchsorted(starts, high, side="right") - 1
    if not (first <= last).all():
        raise RefusedError("a current without a train")
    ranges, places = np.unique(first * len(pieces) + last, return_inverse=True)
    places = places.reshape(low.shape)

    def sums(weights: Array) -> Ends:
        values = weights @ trains.T
        parts = [values[:, code // len(pieces) : code % len(pieces) + 1] for code in ranges]
        least = np.stack([part.min(1) for part in parts], 1)
        most = np.stack([part.max(1) for part in parts], 1)
        return least[:, places], most[:, places]

    sure, possible = sums(np.eye(len(neurons.gains)))
    return Trains(sure, possible, sums)


def window_weights(neurons: Neurons) -> dict[tuple[int, int], Array]:
    """By first and last step, the weight of every step's current in the potential at the end."""
    T = len(neurons.gains)
    found = {}
    for t in range(T):
        for a in range(t + 1):
            row = np.zeros(T)
            for k in range(a, t + 1):
                row[k] = neurons.decay ** (t - k) * neurons.gains[k]
            found[a, t] = row
    return found


class Windows:
    """Spikes of a layer from sums of its currents since the last reset, step by step.

    A case (t, a) is step t with the last reset just before step a; a = 0 is no reset so far. The
    potential h[t] is bounded by the step before, and in each case by ``S[a, t]``, the charges since
    that reset; the smaller of both counts. ``drift`` is how far float32's potential can be from the
    charge equation.

    Args:
        neurons: The layer.
        x: Its current in every step in exact arithmetic, [T, N, *].
        error: How far float32's current can be from that.
        sums: Bounds of the sums of every window in exact arithmetic.
    """

    def __init__(
        self, neurons: Neurons, x: Ball, error: Array, sums: dict[tuple[int, int], Ends]
    ) -> None:
        """Bound all steps."""
        self.neurons = neurons
        self.sums = sums
        rest, threshold, decay = neurons.rest, neurons.threshold, neurons.decay
        low, high = x.ends()
        shape = low.shape[1:]
        v: Ends = (np.full(shape, rest), np.full(shape, rest))
        self.drift = np.zeros(shape)
        self.starts: list[Ends] = [(np.zeros(shape), np.zeros(shape))]
        self.spikes_before: list[Ends] = [(np.zeros(shape), np.zeros(shape))]
        reached = [np.ones(shape, dtype=bool)]
        self.charged: list[list[Ends]] = []
        self.fires: list[list[Array]] = []
        self.may_fire: list[list[Array]] = []
        sure_steps, possible_steps = [], []
        for t, gain in enumerate(neurons.gains):
            least, most = low[t] - error[t], high[t] + error[t]
            if gain < 0:
                least, most = most, least
            leak = (1 - decay) * rest
            terms = max(1.0, decay) * largest(v) + abs(gain) * largest((least, most))
            rounded = of_charge(within_float32(terms + abs(rest) + abs(decay * rest)))
            step = decay * v[0] + gain * least + leak - rounded
            h = (step, decay * v[1] + gain * most + leak + rounded)
            self.drift = (decay * self.drift + abs(gain) * error[t] + rounded) * (1 + ROUNDED)
            cases = [self._case(t, a, h) for a in range(t + 1)]
            self.charged.append(cases)
            fires = [case[0] >= neurons.above for case in cases]
            may_fire = [case[1] >= neurons.below for case in cases]
            self.fires.append(fires)
            self.may_fire.append(may_fire)
            here = np.stack(reached)
            sure = (np.stack(fires) | ~here).all(0)
            possible = (np.stack(may_fire) & here).any(0)
            lows, highs = (np.stack(ends) for ends in zip(*cases, strict=True))
            h = (
                np.maximum(
                    np.where(sure, np.maximum(h[0], neurons.below), h[0]), of(lows, here, 1)
                ),
                np.minimum(
                    np.where(possible, h[1], np.minimum(h[1], neurons.above)), of(highs, here, -1)
                ),
            )
            rounded = of_reset(largest(h) + abs(rest) + abs(threshold))
            self.drift = (self.drift + rounded) * (1 + ROUNDED)
            fired = np.maximum(h[0], neurons.below) - threshold
            self.starts.append((fired, h[1] - threshold))
            v = after_spikes(neurons, h, sure, possible)
            v = (v[0] - rounded, v[1] + rounded)
            self._count(may_fire, reached)
            reached = [one & ~spike for one, spike in zip(reached, fires, strict=True)]
            reached.append(possible)
            sure_steps.append(sure)
            possible_steps.append(possible)
        self.sure = np.stack(sure_steps).astype(float)
        self.possible = np.stack(possible_steps).astype(float)

    def _case(self, t: int, a: int, h: Ends) -> Ends:
        """Bounds of the potential at t if the last reset was just before a."""
        neurons, drift = self.neurons, self.drift
        sums = self.sums[a, t]
        low = sums[0] + neurons.rest - drift
        high = sums[1] + neurons.rest + drift
        if neurons.soft:
            kept = neurons.decay ** (t - a + 1)
            low = low + kept * self.starts[a][0]
            high = high + kept * self.starts[a][1]
        low, high = np.maximum(h[0], low), np.minimum(h[1], high)
        for k in range(a + 1, t + 1):  # there was no spike at k - 1
            silent = np.minimum(self.charged[k - 1][a][1], neurons.above) - neurons.rest
            since = self.sums[k, t][1] + neurons.rest + drift
            high = np.minimum(high, neurons.decay ** (t - k + 1) * silent + since)
        if neurons.soft:
            fewest, most = self.spikes_before[a]
            either = neurons.threshold * fewest, neurons.threshold * most
            low = np.maximum(low, self.sums[0, t][0] - drift - np.maximum(*either))
            high = np.minimum(high, self.sums[0, t][1] + drift - np.minimum(*either))
        return low, high

    def _count(self, may_fire: list[Array], reached: list[Array]) -> None:
        """Bounds of the discounted number of spikes before the next step, by case."""
        fires = np.stack(may_fire) & np.stack(reached)
        fewest, most = (np.stack(ends) for ends in zip(*self.spikes_before, strict=True))
        some = fires.any(0)
        new = (
            np.where(some, of(fewest, fires, 1) + 1, 0),
            np.where(some, of(most, fires, -1) + 1, 0),
        )
        decay = self.neurons.decay
        self.spikes_before = [
            (decay * low * (1 - ROUNDED), decay * high * (1 + ROUNDED))
            for low, high in [*self.spikes_before, new]
        ]

    def bounds(self, weights: Array) -> Ends:
        """Least and largest weighted sums over all paths through the cases, [F, N, *]."""
        return self._over_paths(weights, np.minimum), self._over_paths(weights, np.maximum)

    def _over_paths(self, weights: Array, better: Callable[[Array, Array], Array]) -> Array:
        T = len(self.fires)
        rest = [np.zeros((len(weights), *self.sure.shape[1:]))] * (T + 1)
        for t in reversed(range(T)):
            fire = rest[t + 1] + weights[:, t].reshape(-1, *[1] * (self.sure.ndim - 1))
            now = []
            for a in range(t + 1):
                either = np.where(self.fires[t][a], fire, better(fire, rest[a]))
                now.append(np.where(self.may_fire[t][a], either, rest[a]))
            rest = now
        return rest[0]


def largest(x: Ends) -> Array:
    """Largest absolute values."""
    return np.asarray(np.maximum(np.abs(x[0]), np.abs(x[1])))


def of(values: Array, where: Array, sign: int) -> Array:
    """The least (sign 1) or largest (sign -1) of the values that count."""
    return np.asarray(sign * np.where(where, sign * values, np.inf).min(0))


def after_spikes(neurons: Neurons, h: Ends, sure: Array, possible: Array) -> Ends:
    """Potential after the reset, for a charged one: all that a spike and no spike allow."""
    silent = h[0], np.where(possible, np.minimum(h[1], neurons.above), h[1])
    if neurons.soft:
        fired = np.maximum(h[0], neurons.below) - neurons.threshold, h[1] - neurons.threshold
    else:
        fired = np.full_like(h[0], neurons.rest), np.full_like(h[1], neurons.rest)
    low = np.where(possible, np.minimum(silent[0], fired[0]), silent[0])
    high = np.where(possible, np.maximum(silent[1], fired[1]), silent[1])
    return np.where(sure, fired[0], low), np.where(sure, fired[1], high)


@dataclass(frozen=True)
class Network:
    """Layers one after the other, each step of which is the same map of the spikes of that step
    before it; the first one gets the image in every step, and the logits are means over time.

    Attributes:
        layers: The maps that lead to each spiking layer, and the layer.
        readout: The maps behind the last one.
        T: Time steps.
    """

    layers: list[tuple[list[Map], Neurons]]
    readout: list[Map]
    T: int

    def margins(self, images: Array, labels: Array, eps: float) -> Array:
        """What the label leads every other class by at least, for every image of the balls."""
        x = images.astype(float)
        low = np.maximum(np.nextafter(x - eps, -np.inf), 0.0)
        high = np.minimum(np.nextafter(x + eps, np.inf), 1.0)
        (maps, neurons), *others = self.layers
        current, error = with_errors(maps, ball(low, high), np.zeros_like(x))
        found = chain(neurons, current, error)
        if found is None:
            found = self._constant(neurons, current, error)
        for maps, neurons in others:
            found = self._layer(maps, neurons, found)
        return self._margins(found, labels)

    def _constant(self, neurons: Neurons, current: Ball, error: Array) -> Trains:
        """Spikes for a current that is the same in every step, without a list of trains."""
        sums = {}
        for window, row in window_weights(neurons).items():
            spread = np.abs(row).sum() * ROUNDED * (np.abs(current.centre) + current.radius)
            scaled = Ball(row.sum() * current.centre, abs(row.sum()) * current.radius + spread)
            sums[window] = scaled.ends()
        steps = (self.T, *current.centre.shape)
        every = Ball(np.broadcast_to(current.centre, steps), np.broadcast_to(current.radius, steps))
        found = Windows(neurons, every, np.broadcast_to(error, steps), sums)
        return Trains(found.sure, found.possible, found.bounds)

    def _layer(self, maps: list[Map], neurons: Neurons, before: Trains) -> Trains:
        """Spikes of a layer behind those of another one."""
        current, error = self._steps(maps, before)
        weights = window_weights(neurons)
        rows = np.stack(list(weights.values()))
        sums = before.sums(rows)
        shape = sums.centre.shape
        samples = shape[1]
        factor = np.repeat(rows.sum(1), samples)
        size = np.repeat(np.abs(rows).sum(1), samples)
        flat = Ball(*(part.reshape(-1, *shape[2:]) for part in (sums.centre, sums.radius)))
        mapped = through(maps, flat, factor, size)
        # what windows add to these sums rounds by less than this in float64
        wide = Ball(
            mapped.centre, mapped.radius + ROUNDED * (np.abs(mapped.centre) + mapped.radius)
        )
        low, high = (
            within_float32(end).reshape(len(rows), samples, *end.shape[1:]) for end in wide.ends()
        )
        by_window = dict(zip(weights, zip(low, high, strict=True), strict=True))
        found = Windows(neurons, current, error, by_window)
        return Trains(found.sure, found.possible, found.bounds)

    def _steps(self, maps: list[Map], spikes: Trains) -> tuple[Ball, Array]:
        """Exact values [T, N, *] of every step behind spikes, and what float32 rounds."""
        shape = spikes.sure.shape
        flat = [part.reshape(-1, *shape[2:]) for part in (spikes.sure, spikes.possible)]
        x, error = with_errors(maps, ball(flat[0], flat[1]), np.zeros_like(flat[0]))
        parts = [
            part.reshape(*shape[:2], *x.centre.shape[1:]) for part in (*vars(x).values(), error)
        ]
        return Ball(parts[0], parts[1]), parts[2]

    def _margins(self, spikes: Trains, labels: Array) -> Array:
        """From the mean spikes m: ``(W_y - W_k) m + b_y - b_k``, less what float32 rounds."""
        logits, error = self._steps(self.readout, spikes)
        size = np.abs(logits.centre) + logits.radius + error
        error = error.mean(0) + gamma(self.T + 2) * size.mean(0) + (self.T + 2) * SMALLEST
        once = np.ones(len(labels))
        means = spikes.sums(np.full((1, self.T), 1.0 / self.T))
        *maps, last = self.readout
        m = through(maps, Ball(means.centre[0], means.radius[0]), once, once)
        d = 2.0**-50 * (last.terms + MOST_STEPS + 8)
        weight = last.times(np.eye(m.centre.shape[-1]), False).T  # its rows, as they are
        found = np.empty(len(labels))
        for label in np.unique(labels):
            those = labels == label
            gap = weight - weight[label]
            shift = last.shift - last.shift[label]
            centre, radius = m.centre[those], m.radius[those]
            middle = centre @ gap.T + shift
            spread = (radius + d * (np.abs(centre) + radius)) @ np.abs(gap).T
            spread = spread + d * (np.abs(shift) + np.abs(middle)) + 2.0**-900
            lead = middle + spread + error[those] + error[those][:, [label]]
            lead[:, label] = -np.inf
            found[those] = -(lead + ROUNDED * np.abs(spread)).max(1)
        return found


class Reader:
    """Reads operations, as they were recorded for a batch of :data:`SAMPLES` images, as a network.

    A value is laid out as [steps, N, *], or as [steps * N, *], first step first; any reshape that
    keeps one of both moves no element from one row to another.

    Args:
        place: Shape of an image.
        arrays: Weights by name.
    """

    def __init__(self, place: tuple[int, ...], arrays: dict[str, Array]) -> None:
        """Nothing has been read."""
        self.place = place
        self.arrays = arrays
        self.used: set[str] = set()
        self.steps = 1
        self.in_rows = True
        self.maps: list[Map] = []
        self.layers: list[tuple[list[Map], Neurons]] = []
        self.is_done = False
        self.last = ""

    def network(self, operations: list[dict[str, Any]]) -> Network:
        """The network of all operations."""
        kinds = {
            "reshape": self.reshape,
            "expand": self.expand,
            "conv2d": self.conv2d,
            "linear": self.linear,
            "batch_norm": self.batch_norm,
            "avg_pool2d": self.avg_pool2d,
            "neuron": self.neuron,
            "mean": self.mean,
        }
        for number, given in enumerate(operations):
            kind = given.get("op")
            try:
                if kind not in kinds:
                    raise CertificateError("no such operation is known")
                if self.is_done:
                    raise CertificateError("nothing may follow the mean over time")
                kinds[kind](given)
            except (CertificateError, LookupError, TypeError, ValueError) as error:
                raise CertificateError(f"operation {number} ({kind}): {error!r}") from error
            if kind not in ("reshape", "mean"):
                self.last = kind
        if not (self.is_done and self.layers and self.last == "linear" and len(self.place) == 1):
            raise CertificateError("a linear map and a mean over time must follow the last neurons")
        if self.used != set(self.arrays):
            raise CertificateError("a weight that no operation takes")
        return Network(self.layers, self.maps, self.steps)

    def weight(self, name: Any, shape: tuple[int, ...] | None = None) -> Array:
        """A weight in float64."""
        found = self.arrays[name]
        self.used.add(name)
        self.check(found.dtype == np.float32 and np.isfinite(found).all(), "weights in float32")
        self.check(shape is None or found.shape == shape, f"a weight {name} of shape {shape}")
        return found.astype(float)

    def check(self, holds: Any, what: str) -> None:
        """Refuse what is not as it should be."""
        if not holds:
            raise CertificateError(f"expected {what}")

    def add(self, one: Map) -> None:
        """A map that every row goes through."""
        self.check(one.terms <= 2**20, "at most a million terms")
        self.place = one.times(np.zeros((1, *self.place)), False).shape[1:]
        self.maps.append(one)

    def reshape(self, given: dict[str, Any]) -> None:
        shape = integers(given["shape"], least=1)
        self.in_rows = shape[0] == self.steps * SAMPLES
        kept = [self.steps * SAMPLES] if self.in_rows else [self.steps, SAMPLES]
        self.check(shape[: len(kept)] == kept, "steps and samples first")
        place = tuple(shape[len(kept) :])
        self.check(math.prod(place) == math.prod(self.place), "as many values")
        if place != self.place:
            nothing = np.zeros(())
            self.add(Map(lambda x, _: x.reshape(len(x), *place), nothing, nothing, 0))

    def expand(self, given: dict[str, Any]) -> None:
        shape = integers(given["shape"], least=1)
        self.check(not self.in_rows and shape[1:] == [SAMPLES, *self.place], "new time steps alone")
        self.check(self.steps in (1, shape[0]) and not self.layers, "images that are repeated")
        self.steps = shape[0]

    def of_channels(self) -> int:
        self.check(self.in_rows and len(self.place) == 3, "[steps * N, C, H, W]")
        return self.place[0]

    def bias(self, name: Any, size: int) -> Array:
        return np.zeros(size) if name is None else self.weight(name, (size,))

    def conv2d(self, given: dict[str, Any]) -> None:
        channels, weight = self.of_channels(), self.weight(given["weight"])
        pairs = {name: integers(given[name], 2, least=1) for name in ("stride", "dilation")}
        pairs["padding"] = integers(given["padding"], 2, least=0)
        (groups,) = integers([given["groups"]], least=1)
        fits = weight.ndim == 4 and weight.shape[1] * groups == channels
        self.check(fits and len(weight) % groups == 0, "a weight that fits the channels")
        bias = self.bias(given["bias"], len(weight))
        self.add(convolution(weight, bias, {**pairs, "groups": groups}))

    def linear(self, given: dict[str, Any]) -> None:
        weight = self.weight(given["weight"])
        self.check(weight.ndim == 2 and weight.shape[1] == self.place[-1], "a weight that fits")
        self.add(linear(weight, self.bias(given["bias"], len(weight))))

    def batch_norm(self, given: dict[str, Any]) -> None:
        channels = self.of_channels()
        names = ("mean", "variance", "weight", "bias")
        parts = [self.weight(given[name], (channels,)) for name in names]
        self.add(batch_norm(parts[0], parts[1], parts[2], parts[3], finite(given["eps"])))

    def avg_pool2d(self, given: dict[str, Any]) -> None:
        self.of_channels()
        self.add(average(*(integers(given[name], 2, least=1) for name in ("size", "stride"))))

    def neuron(self, given: dict[str, Any]) -> None:
        gains = tuple(map(finite, given["gains"]))
        self.check(not self.in_rows and len(gains) == self.steps <= MOST_STEPS, "a gain per step")
        decay, threshold = finite(given["decay"]), finite(given["threshold"])
        self.check(decay >= 0, "a decay >= 0")
        soft = given["rest"] is None
        rest = 0.0 if soft else finite(given["rest"])
        self.layers.append((self.maps, Neurons(decay, gains, threshold, rest, soft)))
        self.maps = []

    def mean(self, given: dict[str, Any]) -> None:
        self.check(not self.in_rows, "[steps, N, *]")
        self.is_done = True


def finite(value: Any) -> float:
    """A number."""
    if type(value) not in (int, float) or not abs(value) <= LARGEST:
        raise CertificateError(f"expected a finite number, got {value!r}")
    return float(value)


def integers(value: Any, number: int | None = None, *, least: int) -> list[int]:
    """Integers, of which there must be so many."""
    is_list = isinstance(value, list) and all(type(one) is int and one >= least for one in value)
    if not is_list or number not in (None, len(value)) or not value:
        raise CertificateError(f"expected integers of at least {least}, got {value!r}")
    return list(value)


def digest(text: Any, arrays: dict[str, Array]) -> str:
    """SHA-256 of what can be written as JSON, and of arrays by name."""
    found = hashlib.sha256(json.dumps(text, sort_keys=True).encode())
    for name in sorted(arrays):
        one = arrays[name]
        found.update(json.dumps([name, one.dtype.str, one.shape]).encode())
        found.update(np.ascontiguousarray(one).tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Certificate:
    """What a file says.

    Attributes:
        network: The network.
        name: Its SHA-256.
        images: In float32, [N, *].
        labels: [N].
        numbers: Of the images where they come from.
        eps: Radius.
    """

    network: Network
    name: str
    images: Array
    labels: Array
    numbers: Array
    eps: float

    @classmethod
    def read(cls, path: str) -> "Certificate":
        """Read a file; CertificateError if it is none."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(arrays.pop("header").tobytes())
            images, labels, numbers = (arrays.pop(key) for key in ("images", "labels", "numbers"))
            name = digest(header["operations"], arrays)
            claim = {"images": images, "labels": labels, "numbers": numbers}
            told = header["network"], header["claim"]
            is_whole = told == (name, digest([name, header["eps"]], claim))
            if header["format"] != FORMAT:
                raise CertificateError(f"the format must be {FORMAT!r}, got {header['format']!r}")
            if not is_whole:
                raise CertificateError("it was changed: its SHA-256 is another one")
            network = Reader(images.shape[1:], arrays).network(header["operations"])
            eps = finite(header["eps"])
            check_claim(images, labels, numbers, len(network.readout[-1].shift), eps)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CertificateError(f"not a certificate: {error!r}") from error
        except zipfile.BadZipFile as error:
            raise CertificateError(f"a damaged file: {error}") from error
        return cls(network, name, images, labels, numbers, eps)

    def margins(self) -> Array:
        """What each label leads by at least; -inf or NaN where nothing can be said."""
        found = np.full(len(self.images), -np.inf)
        for start in range(0, len(found), BATCH):
            part = slice(start, start + BATCH)
            try:
                with np.errstate(all="ignore"):
                    found[part] = self.network.margins(
                        self.images[part], self.labels[part], self.eps
                    )
            except RefusedError as error:
                print(f"images {part.start} to {part.stop - 1} of the file: {error}")
        return found


def check_claim(images: Array, labels: Array, numbers: Array, classes: int, eps: float) -> None:
    """Images in [0, 1] in float32, labels among the classes, and a radius >= 0."""
    if images.dtype != np.float32 or not ((images >= 0) & (images <= 1)).all():
        raise CertificateError("images must be in float32 and in [0, 1]")
    if labels.dtype != np.int64 or labels.shape != (len(images),) or numbers.shape != labels.shape:
        raise CertificateError("every image must have a label and a number, int64")
    if not ((labels >= 0) & (labels < classes)).all() or classes < 2 or not eps >= 0:
        raise CertificateError("labels must be among the classes, and eps >= 0")


def main(arguments: list[str]) -> int:
    """Check a file, and say yes or no for every image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("certificate", help="file of Verification.save_certificate")
    parser.add_argument("--network", help="SHA-256 that the network must have")
    parser.add_argument("--quiet", action="store_true", help="show no line per image")
    options = parser.parse_args(arguments)
    try:
        certificate = Certificate.read(options.certificate)
        if options.network not in (None, certificate.name):
            raise CertificateError(f"it is of another network, {certificate.name}")
    except CertificateError as error:
        print(f"{options.certificate}: {error}")
        return 2
    margins = certificate.margins()
    accepted = margins > 0
    rows = zip(certificate.numbers, certificate.labels, margins, accepted, strict=True)
    for number, label, margin, is_proved in rows if not options.quiet else ():
        told = f"yes, class {label} leads by {margin:.3g}" if is_proved else "no"
        print(f"image {number}: {told}")
    print(
        f"{accepted.sum()} of {len(accepted)} images accepted: each keeps its label within Linf "
        f"{certificate.eps:g}; network {certificate.name}"
    )
    return 0 if accepted.all() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
