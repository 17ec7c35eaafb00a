"""Check a certificate of a spiking network's proofs, with numpy and Python alone.

The file says: for each of its images, every image in [0, 1] that differs by at most eps in each
pixel gets the given label from its network, run in float32 with sums in any order. It has no bound
that could be trusted: all are computed here from weights, images, labels and eps, with what float32
and float64 round; docs/concepts/joint.md derives them. Assumed: rounding to nearest, and sums of
products (no TF32, no Winograd), also in numpy. The SHA-256 that is shown, and that
Verification.save_certificate returns, names the network: another weight makes it another one.

The exit code is 0 if every image is accepted, 1 if one is not, and 2 if the file is malformed.

Examples:
    python recipes/check_certificate.py proofs.npz
    python recipes/check_certificate.py proofs.npz --network 38a260ae...  # must be this one
"""

import argparse
import contextlib
import hashlib
import json
import math
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Ends = tuple[Array, Array]
"""Smallest and largest values."""

FORMAT = "sj_robust certificate 1"
SAMPLES = 2  # of the batch whose operations were recorded
SURPLUS = 1.000001
"""Factor of float32's errors. It adds more than 2**-42 of the same sizes, which covers a thousand
roundings of float64 in the formulas beside them."""
ROUNDED = 2.0**-40  # a thousand roundings of float64, relative to values of one sign
SMALLEST, LARGEST = 2.0**-126, 2.0**76  # float32 may flush below; nothing beyond is looked at
MOST_STEPS, MOST_TRAINS, BATCH = 32, 4096, 50


class CertificateError(Exception):
    """The file is no certificate, or has something that this program does not know."""


def check(holds: Any, what: str) -> None:
    """Refuse a file that is not as it should be."""
    if not holds:
        raise CertificateError(f"expected {what}")


def gamma(terms: int) -> float:
    """Relative error of a float32 sum of so many products in any order, n u / (1 - n u)."""
    return SURPLUS * terms * 2.0**-24 / (1.0 - terms * 2.0**-24)


def within_float32(values: Array) -> Array:
    """Values that are finite in float32, and no NaN; ArithmeticError for others."""
    if not (np.abs(values) <= LARGEST).all():
        raise ArithmeticError("values that are not finite, or too large for float32")
    return values


@dataclass(frozen=True)
class Ball:
    """Exact values within ``radius`` of ``centre``, which float32 gives with ``error``."""

    centre: Array
    radius: Array
    error: Any = 0.0

    @classmethod
    def between(cls, low: Array, high: Array) -> "Ball":
        """The values between two ends, without an error."""
        centre = (low + high) / 2
        return cls(centre, np.nextafter(np.maximum(high - centre, centre - low), np.inf))

    def ends(self) -> Ends:
        """Smallest and largest exact values."""
        below = np.nextafter(self.centre - self.radius, -np.inf)
        return below, np.nextafter(self.centre + self.radius, np.inf)

    def rows(self, *shape: int, keep: int) -> "Ball":
        """With other first dimensions, and the last ones from ``keep`` on."""
        parts = np.broadcast_arrays(self.centre, self.radius, self.error)
        return Ball(*(part.reshape(*shape, *part.shape[keep:]) for part in parts))


@dataclass(frozen=True)
class Map:
    """``A x + b``, the same for every row of x [rows, *].

    Attributes:
        times: ``A x``, or with True ``|A| x``.
        terms: Terms of a sum.
        shift: b, broadcast.
        size: Sum of the absolute values that b is computed from.
    """

    times: Callable[[Array, bool], Array]
    terms: int = 0
    shift: Any = 0.0
    size: Any = 0.0

    def __call__(self, x: Ball, factor: Any = 1.0, sizes: Any = 1.0) -> Ball:
        """``A x + factor b``, with a factor of each row, whose own error is at most a rounding of
        its size per time step.

        Equation, with d eight roundings of float64 for every term, g those of float32::

            centre' = A centre + factor b
            radius' = |A| (radius + d (|centre| + radius)) + d (size |b| + |centre'|)
            error'  = |A| (error + g (|centre| + radius + error)) + g |b|
        """
        d, g = 2.0**-50 * (self.terms + MOST_STEPS + 8), gamma(self.terms)
        size = np.abs(x.centre) + x.radius
        centre = self.times(x.centre, False)
        by_row = (-1, *[1] * (centre.ndim - 1))
        factor, sizes = np.reshape(factor, by_row), np.reshape(sizes, by_row)
        centre = centre + factor * self.shift
        radius = self.times(x.radius + d * size, True) + d * (sizes * self.size + np.abs(centre))
        error = self.times(x.error + g * (size + x.error), True) + g * self.size
        error = (1 + ROUNDED * self.terms) * (error + self.terms * SMALLEST)
        return Ball(centre, radius + 2.0**-900, within_float32(error))


def patches(x: Array, size: list[int], stride: list[int]) -> Array:
    """What each output of a convolution sees, [rows, C, height, width, *size]."""
    every = np.lib.stride_tricks.sliding_window_view(x, tuple(size), axis=(2, 3))
    return every[:, :, :: stride[0], :: stride[1]]


def convolution(weight: Array, bias: Array, stride: list[int], padding: list[int]) -> Map:
    """Of [rows, C, H, W]."""
    kernel, shift = weight.reshape(len(weight), -1), bias.reshape(-1, 1, 1)

    def times(x: Array, absolute: bool) -> Array:
        sides = [(0, 0), (0, 0), *[(number, number) for number in padding]]
        seen = patches(np.pad(x, sides), list(weight.shape[2:]), stride)
        rows = seen.transpose(0, 2, 3, 1, 4, 5).reshape(len(x), *seen.shape[2:4], -1)
        return (rows @ (np.abs(kernel) if absolute else kernel).T).transpose(0, 3, 1, 2)

    return Map(times, kernel.shape[1] + 2, shift, np.abs(shift))


def batch_norm(mean: Array, variance: Array, weight: Array, bias: Array, eps: float) -> Map:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` of [rows, C, H, W]."""
    check((variance + eps > 0).all(), "variances above -eps")
    slope = (weight / np.sqrt(variance + eps)).reshape(-1, 1, 1)
    of_mean, bias = mean.reshape(-1, 1, 1) * slope, bias.reshape(-1, 1, 1)
    size = np.abs(of_mean) + np.abs(bias) + np.abs(bias - of_mean)  # summed in either order
    times = lambda x, absolute: x * (np.abs(slope) if absolute else slope)  # noqa: E731
    return Map(times, 12, bias - of_mean, size)


@dataclass(frozen=True)
class Neurons:
    """A spiking layer: ``h = decay v + gains[t] x + (1 - decay) rest``, a spike where ``h >=
    threshold``, and then v is rest, or h - threshold if soft. It starts at rest. Float32 is silent
    ``below``, and fires ``above``.
    """

    decay: float
    gains: list[float]
    threshold: float
    rest: float
    soft: bool
    below: float
    above: float

    def windows(self) -> dict[tuple[int, int], Array]:
        """By first and last step, the weights of all currents in the potential at the last one."""
        found = {}
        for t in range(len(self.gains)):
            for a in range(t + 1):
                kept = [
                    self.decay ** (t - k) if a <= k <= t else 0.0 for k in range(len(self.gains))
                ]
                found[a, t] = np.array(kept) * self.gains
        return found


@dataclass(frozen=True)
class Spikes:
    """What is known of a layer's spikes: 1 where there is one for ``sure``, or one is ``possible``,
    [T, N, *]; ``joint`` bounds ``sum_t weights[f, t] s[t]``, [F, N, *].
    """

    sure: Array
    possible: Array
    joint: Callable[[Array], Ends]

    def sums(self, weights: Array) -> Ball:
        """What ``joint`` bounds, cut off where single steps say more."""
        low, high = self.joint(weights)
        up, down = np.maximum(weights, 0), np.minimum(weights, 0)
        least = np.tensordot(up, self.sure, 1) + np.tensordot(down, self.possible, 1)
        most = np.tensordot(up, self.possible, 1) + np.tensordot(down, self.sure, 1)
        rounding = ROUNDED * np.abs(weights).sum(1).reshape(-1, *[1] * (low.ndim - 1))
        return Ball.between(np.maximum(low, least) - rounding, np.minimum(high, most) + rounding)

    def through(self, maps: list[Map]) -> Ball:
        """What maps make of the spikes of every step, [T, N, *]."""
        found = Ball.between(self.sure, self.possible).rows(-1, keep=2)
        for one in maps:
            found = one(found)
        return found.rows(*self.sure.shape[:2], keep=1)


@dataclass(frozen=True)
class Piece:
    """Currents I in [low, high] that have given one train so far: ``v = rest + slope I + offset -+
    drift``, of at most ``size``.
    """

    low: Any
    high: Any
    slope: Fraction
    offset: Fraction
    drift: Fraction
    size: Fraction
    train: tuple[int, ...] = ()

    def cut(self, reached: Fraction, spike: int) -> "list[Piece]":
        """The currents whose potential above rest can be at least (at most) so much, if any."""
        needed = reached - self.offset - (self.drift if spike else -self.drift)
        found = replace(self, train=(*self.train, spike))
        if self.slope == 0:
            return [found] if (needed <= 0 if spike else needed >= 0) else []
        end = needed / self.slope
        if bool(spike) == (self.slope > 0):
            found = replace(found, low=max(self.low, end))
        else:
            found = replace(found, high=min(self.high, end))
        return [found] if found.low <= found.high else []


def listed_trains(neurons: Neurons, largest: float, error: float) -> list[Piece]:
    """All trains for constant currents up to ``largest``, of which float32 sees one in each step
    that is at most ``error`` away; in exact arithmetic.
    """
    decay, rest, threshold = map(Fraction, (neurons.decay, neurons.rest, neurons.threshold))
    below, above, zero = Fraction(neurons.below) - rest, Fraction(neurons.above) - rest, Fraction(0)
    least = 16 * Fraction(SMALLEST)
    pieces = [Piece(-math.inf, math.inf, zero, zero, zero, abs(rest))]
    for gain in map(Fraction, neurons.gains):
        before, pieces = pieces, []
        for piece in before:
            terms = decay * piece.size + abs(gain) * Fraction(largest) + abs((1 - decay) * rest)
            charge = Fraction(gamma(16)) * (terms + piece.size + abs(rest)) + least
            reset = Fraction(gamma(4)) * (terms + charge + abs(rest) + abs(threshold)) + least
            drift = decay * piece.drift + abs(gain) * Fraction(error) + charge
            slope, offset = decay * piece.slope + gain, decay * piece.offset
            size = terms + charge + reset
            charged = replace(piece, slope=slope, offset=offset, drift=drift, size=size)
            for one in charged.cut(above, 0):
                pieces.append(replace(one, drift=drift + reset))
            if neurons.soft:
                slope, drift, offset, size = slope, drift, offset - threshold, size + abs(threshold)
            else:
                slope, drift, offset, size = zero, zero, zero, abs(rest) + reset
            for one in charged.cut(below, 1):
                after = {"slope": slope, "offset": offset, "drift": drift + reset, "size": size}
                pieces.append(replace(one, **after))
        if len(pieces) > MOST_TRAINS:
            raise ArithmeticError(f"a layer with more than {MOST_TRAINS} trains")
    return sorted(pieces, key=lambda piece: (piece.low, piece.high))


def outward(value: Any, towards: float) -> float:
    """A number of float64 that is on this side of a value."""
    try:
        return math.nextafter(float(value), towards)
    except OverflowError:
        return towards


def chained(neurons: Neurons, x: Ball) -> Spikes:
    """Spikes for a current [N, *] that is the same in every step: a chain of trains."""
    low, high = x.ends()
    off = float(x.error.max())
    most = outward(max(np.abs(low).max(), np.abs(high).max()) + off, math.inf)
    pieces = listed_trains(neurons, most, off)
    trains = np.array([piece.train for piece in pieces], dtype=float)
    starts = [outward(piece.low, -math.inf) for piece in pieces]
    stops = np.maximum.accumulate([outward(piece.high, math.inf) for piece in pieces])
    first = np.searchsorted(stops, low)
    last = np.searchsorted(starts, high, side="right") - 1
    if not (first <= last).all():
        raise ArithmeticError("a current without a train")
    ranges, places = np.unique(first * len(pieces) + last, return_inverse=True)
    places = places.reshape(low.shape)

    def sums(weights: Array) -> Ends:
        values = weights @ trains.T
        parts = [values[:, one // len(pieces) : one % len(pieces) + 1] for one in ranges]
        least = np.stack([part.min(1) for part in parts], 1)
        return least[:, places], np.stack([part.max(1) for part in parts], 1)[:, places]

    return Spikes(*sums(np.eye(len(neurons.gains))), sums)


def windowed(neurons: Neurons, x: Ball, sums: dict[tuple[int, int], Ends]) -> Spikes:
    """Spikes of a layer with a current [T, N, *], step by step, in all cases of the last reset.

    In case a the last reset was just before step a; a = 0 is none. The charged potential is bounded
    by that of the step before, and by the exact charges ``sums[a, t]`` since the reset, whatever
    float32 rounded since (drift)::

        h[t] = decay**(t-a+1) v[a-1] + S[a, t] + rest -+ drift, v[a-1] above rest, 0 if not soft
        h[t] <= decay**(t-k+1) (min(h[k-1], threshold) - rest) + S[k, t] + rest + drift,  a < k <= t
    """
    decay, rest, below, above = neurons.decay, neurons.rest, neurons.below, neurons.above
    nothing = np.zeros(x.centre.shape[1:])
    current = x.ends()
    v, drift = (nothing + rest, nothing + rest), nothing
    starts, reached = [(nothing, nothing)], [nothing == 0]
    cases: list[Ends] = []
    decided: list[Ends] = []
    for t, gain in enumerate(neurons.gains):
        inputs = gain * (current[0][t] - x.error[t]), gain * (current[1][t] + x.error[t])
        size = np.maximum(*map(np.abs, inputs)) + max(1.0, decay) * np.maximum(*map(np.abs, v))
        rounded = gamma(16) * (within_float32(size) + (1 + decay) * abs(rest)) + 16 * SMALLEST
        least = decay * v[0] + np.minimum(*inputs) + (1 - decay) * rest - rounded
        most = decay * v[1] + np.maximum(*inputs) + (1 - decay) * rest + rounded
        drift = (decay * drift + abs(gain) * x.error[t] + rounded) * (1 + ROUNDED)
        lows, highs = [], []
        for a in range(t + 1):
            kept = decay ** (t - a + 1) if neurons.soft else 0.0
            lows.append(np.maximum(least, kept * starts[a][0] + sums[a, t][0] + rest - drift))
            high = np.minimum(most, kept * starts[a][1] + sums[a, t][1] + rest + drift)
            for k in range(a + 1, t + 1):
                silent = np.minimum(cases[k - 1][1][a], above) - rest
                since = decay ** (t - k + 1) * silent + sums[k, t][1]
                high = np.minimum(high, since + rest + drift)
            highs.append(high)
        cases.append((np.stack(lows), np.stack(highs)))
        fires, may_fire, here = cases[t][0] >= above, cases[t][1] >= below, np.stack(reached)
        sure, possible = (fires | ~here).all(0), (may_fire & here).any(0)
        decided.append((sure, possible))
        reached = [*(here & ~fires), possible]
        low = np.maximum(least, np.where(here, cases[t][0], np.inf).min(0))
        high = np.minimum(most, np.where(here, cases[t][1], -np.inf).max(0))
        size = np.maximum(np.abs(low), np.abs(high)) + abs(rest) + abs(neurons.threshold)
        rounded = gamma(4) * size + 4 * SMALLEST
        drift = (drift + rounded) * (1 + ROUNDED)
        starts.append((np.maximum(low, below) - neurons.threshold, high - neurons.threshold))
        fired = starts[-1] if neurons.soft else (nothing + rest, nothing + rest)
        silent = np.minimum(high, above)
        low = np.where(sure, fired[0], np.where(possible, np.minimum(low, fired[0]), low))
        high = np.where(sure, fired[1], np.where(possible, np.maximum(silent, fired[1]), silent))
        v = low - rounded, high + rounded

    def best(weights: Array, better: Callable[[Array, Array], Array]) -> Array:
        """Of weighted sums over all paths through the cases stay and fire, [F, N, *]."""
        rest = [np.zeros((len(weights), *nothing.shape))] * (len(cases) + 1)
        for t, (lows, highs) in reversed(list(enumerate(cases))):
            fire = rest[t + 1] + weights[:, t].reshape(-1, *[1] * nothing.ndim)
            now = []
            for low, high, stay in zip(lows, highs, rest, strict=False):
                either = np.where(low >= above, fire, better(fire, stay))
                now.append(np.where(high >= below, either, stay))
            rest = now
        return rest[0]

    sure, possible = (np.stack(one).astype(float) for one in zip(*decided, strict=True))
    return Spikes(sure, possible, lambda w: (best(w, np.minimum), best(w, np.maximum)))


@dataclass(frozen=True)
class Network:
    """Spiking layers, each behind maps of the spikes of one step, the first behind maps of the
    image; the logits are means over T steps of the ``readout``, whose last map has ``weight``.
    """

    layers: list[tuple[list[Map], Neurons]]
    readout: list[Map]
    weight: Array
    T: int

    def margins(self, images: Array, labels: Array, eps: float) -> Array:
        """What each label leads by at least in its ball; -inf or NaN where nothing can be said."""
        found = np.full(len(images), -np.inf)
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            with contextlib.suppress(ArithmeticError), np.errstate(all="ignore"):
                found[part] = self._of_some(images[part].astype(float), labels[part], eps)
        return found

    def _of_some(self, x: Array, labels: Array, eps: float) -> Array:
        low = np.maximum(np.nextafter(x - eps, -np.inf), 0.0)
        current = Ball.between(low, np.minimum(np.nextafter(x + eps, np.inf), 1.0))
        (maps, neurons), *others = self.layers
        for one in maps:
            current = one(current)
        spikes = chained(neurons, current)
        for maps, neurons in others:
            windows = neurons.windows()
            rows = np.stack(list(windows.values()))
            mapped = spikes.sums(rows).rows(-1, keep=2)
            factors = [np.repeat(one.sum(1), len(x)) for one in (rows, np.abs(rows))]
            for one in maps:
                mapped = one(mapped, *factors)
            rounding = ROUNDED * (np.abs(mapped.centre) + mapped.radius)
            ends = (
                Ball(mapped.centre, mapped.radius + rounding).rows(len(rows), len(x), keep=1).ends()
            )
            sums = dict(zip(windows, zip(*map(within_float32, ends), strict=True), strict=True))
            spikes = windowed(neurons, spikes.through(maps), sums)
        return self._margins(spikes, labels)

    def _margins(self, spikes: Spikes, labels: Array) -> Array:
        """From the mean spikes m: ``(W_y - W_k) m + b_y - b_k``, less what float32 rounds."""
        logits = spikes.through(self.readout)
        size = np.abs(logits.centre) + logits.radius + logits.error
        error = logits.error.mean(0) + gamma(self.T + 2) * size.mean(0) + (self.T + 2) * SMALLEST
        m = spikes.sums(np.full((1, self.T), 1.0 / self.T)).rows(-1, keep=2)
        *maps, last = self.readout
        for one in maps:
            m = one(m)
        row, label = np.arange(len(labels)), labels.reshape(-1, 1)
        gap, shift = self.weight - self.weight[label], last.shift - last.shift[label]
        middle = (gap @ m.centre[..., None])[..., 0] + shift
        d = 2.0**-50 * (last.terms + MOST_STEPS + 8)
        radius = m.radius + d * (np.abs(m.centre) + m.radius)
        spread = (np.abs(gap) @ radius[..., None])[..., 0] + d * (np.abs(shift) + np.abs(middle))
        lead = middle + (1 + ROUNDED) * (spread + error + error[row, labels, None] + 2.0**-900)
        lead[row, labels] = -np.inf
        return np.asarray(-lead.max(1))


def finite(value: Any) -> float:
    """A number."""
    check(type(value) in (int, float) and abs(value) <= LARGEST, f"a number, got {value!r}")
    return float(value)


def integers(value: Any, *, least: int) -> list[int]:
    """Integers."""
    fits = isinstance(value, list) and value
    fits = fits and all(type(one) is int and least <= one <= 2**31 for one in value)
    check(fits, f"integers of at least {least}, got {value!r}")
    return list(value)


def read_network(operations: Any, place: tuple[int, ...], arrays: dict[str, Array]) -> Network:
    """The network of operations as they were recorded for a batch of :data:`SAMPLES` images, which
    have this shape. Values are laid out as [steps, N, *], or as [steps * N, *], first step first: a
    reshape that keeps these leaves every element in its row.
    """
    steps, in_rows, weight, unused = 1, True, np.zeros((0, 0)), set(arrays)
    maps: list[Map] = []
    layers: list[tuple[list[Map], Neurons]] = []

    def weights(given: dict[str, Any], *names: str) -> list[Array]:
        found = [arrays[given[name]] for name in names]
        unused.difference_update(given[name] for name in names)
        is_known = all(one.dtype == np.float32 and np.isfinite(one).all() for one in found)
        check(is_known, "finite weights in float32")
        return [one.astype(float) for one in found]

    kinds = [given["op"] for given in operations]
    check(kinds.count("mean") == 1 and kinds[-1] == "mean", "a mean over time at the end")
    for kind, given in zip(kinds, operations, strict=True):
        if kind in ("conv2d", "batch_norm", "avg_pool2d"):
            check(in_rows and len(place) == 3, f"[steps * N, C, H, W] for {kind}")
        if kind in ("neuron", "mean", "expand"):
            check(not in_rows, f"[steps, N, *] for {kind}")
        before = len(maps)
        if kind in ("reshape", "expand"):
            shape = integers(given["shape"], least=1)
        if kind == "reshape":
            in_rows = shape[0] == steps * SAMPLES
            kept = [steps * SAMPLES] if in_rows else [steps, SAMPLES]
            new = tuple(shape[len(kept) :])
            fits = shape[: len(kept)] == kept and math.prod(new) == math.prod(place)
            check(fits, f"a shape for {steps} steps of {SAMPLES} x {place}, got {shape}")
            maps.append(Map(lambda x, _, new=new: x.reshape(len(x), *new)))  # type: ignore[misc]
        elif kind == "expand":
            is_repeated = steps in (1, shape[0]) and not layers
            check(is_repeated and shape[1:] == [SAMPLES, *place], "images that are repeated")
            steps = shape[0]
        elif kind == "conv2d":
            kernel, bias = weights(given, "weight", "bias")
            check(kernel.ndim == 4 and bias.shape == kernel.shape[:1], "a kernel and its bias")
            check(kernel.shape[1] == place[0], "a kernel for so many channels")
            pads = integers(given["padding"], least=0)
            maps.append(convolution(kernel, bias, integers(given["stride"], least=1), pads))
        elif kind == "linear":
            weight, bias = weights(given, "weight", "bias")
            check(weight.ndim == 2 and bias.shape == weight.shape[:1], "a matrix and its bias")
            times = lambda x, absolute, w=weight: x @ (np.abs(w) if absolute else w).T  # noqa: E731
            maps.append(Map(times, weight.shape[1] + 2, bias, np.abs(bias)))
        elif kind == "batch_norm":
            parts = weights(given, "mean", "variance", "weight", "bias")
            check(all(part.shape == place[:1] for part in parts), "a number per channel")
            maps.append(batch_norm(*parts, eps=finite(given["eps"])))
        elif kind == "avg_pool2d":
            size, stride = (integers(given[key], least=1) for key in ("size", "stride"))
            pool = lambda x, _, s=size, by=stride: patches(x, s, by).mean((-1, -2))  # noqa: E731
            maps.append(Map(pool, math.prod(size) + 2))
        elif kind == "neuron":
            gains, soft = list(map(finite, given["gains"])), given["rest"] is None
            check(len(gains) == steps <= MOST_STEPS, f"{steps} <= {MOST_STEPS} gains")
            decay, theta = finite(given["decay"]), finite(given["threshold"])
            check(decay >= 0, "a decay >= 0")
            rest, off = finite(given["rest"] or 0.0), SURPLUS * 2.0**-24 * abs(theta)
            node = Neurons(decay, gains, theta, rest, soft, theta - off, theta + off)
            layers.append((maps, node))
            maps = []
        else:
            check(kind == "mean", f"an operation that is known, got {kind!r}")
        if len(maps) > before:
            check(maps[-1].terms <= 2**20, "at most a million terms")
            place = maps[-1].times(np.zeros((1, *place)), False).shape[1:]
    is_linear = maps and maps[-1].terms > 0 and maps[-1].shift is bias
    check(layers and is_linear and len(place) == 1, "neurons, and a linear map at the end")
    check(not unused, f"no other arrays than those of operations, got {sorted(unused)}")
    return Network(layers, maps, weight, steps)


def digest(text: Any, arrays: dict[str, Array]) -> str:
    """SHA-256 of what can be written as JSON, and of arrays by name."""
    found = hashlib.sha256(json.dumps(text, sort_keys=True).encode())
    for name in sorted(arrays):
        one = arrays[name]
        found.update(json.dumps([name, one.dtype.str, one.shape]).encode())
        found.update(np.ascontiguousarray(one).tobytes())
    return found.hexdigest()


def read(path: str) -> tuple[Network, str, float, list[Array]]:
    """The network of a file, its SHA-256, the radius, and images, labels and numbers of images;
    CertificateError if it is no certificate.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        check(header["format"] == FORMAT, f"the format {FORMAT!r}")
        claim = {key: arrays.pop(key) for key in ("images", "labels", "numbers")}
        name, eps = digest(header["operations"], arrays), finite(header["eps"])
        whole = digest([name, header["eps"]], claim)
        check((header["network"], header["claim"]) == (name, whole), "what its SHA-256 is of")
        images, labels, numbers = claim.values()
        check(images.dtype == np.float32 and images.ndim > 1, "images in float32")
        check(((images >= 0) & (images <= 1)).all() and eps >= 0, "images in [0, 1], eps >= 0")
        check(labels.dtype == numbers.dtype == np.int64, "labels in int64")
        check(labels.shape == numbers.shape == (len(images),), "a label for every image")
        network = read_network(header["operations"], images.shape[1:], arrays)
        check(((labels >= 0) & (labels < len(network.weight))).all(), "labels of classes")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise CertificateError(f"a damaged file: {error!r}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CertificateError(f"no certificate: {error!r}") from error
    return network, name, eps, list(claim.values())


def main(arguments: list[str]) -> int:
    """Say yes or no for every image of a file."""
    parser = argparse.ArgumentParser(description="Check a certificate of proofs.")
    parser.add_argument("certificate", help="file of Verification.save_certificate")
    parser.add_argument("--network", help="SHA-256 that the network must have")
    options = parser.parse_args(arguments)
    try:
        network, name, eps, (images, labels, numbers) = read(options.certificate)
        check(options.network in (None, name), f"that network, got {name}")
    except CertificateError as error:
        print(f"{options.certificate}: {error}")
        return 2
    margins = network.margins(images, labels, eps)
    for number, label, margin in zip(numbers, labels, margins, strict=True):
        print(f"image {number}: " + (f"yes, {label} leads by {margin:.3g}" if margin > 0 else "no"))
    accepted = int((margins > 0).sum())
    print(f"{accepted} of {len(margins)} images keep their label within Linf {eps:g}")
    print(f"network {name}")
    return 0 if accepted == len(margins) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
