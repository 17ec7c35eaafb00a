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
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Ends = tuple[Array, Array]  # smallest and largest values

FORMAT = "sj_robust certificate 1"
SAMPLES = 2  # of the batch whose operations were recorded
SURPLUS = 1.000001
"""Factor of float32's errors. It adds more than 2**-42 of the same sizes, which covers a thousand
roundings of float64 in the formulas beside them."""
ROUNDED = 2.0**-40  # a thousand roundings of float64, relative to values of one sign
SMALLEST, LARGEST = 2.0**-126, 2.0**76  # float32 may flush below; nothing beyond is looked at
MOST_STEPS, MOST_TRAINS, BATCH = 32, 4096, 50


def check(holds: Any, what: str) -> None:
    """Raise ValueError if a file is not as it should be."""
    if not holds:
        raise ValueError(f"expected {what}")


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
    """``A x + b``, the same for every row of x [rows, *]: ``times`` gives A x, or with True |A| x,
    in sums of so many ``terms``; ``shift`` is b, computed from values of ``size``.
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


def product(weight: Array, x: Array, absolute: bool) -> Array:
    """``A x`` of the last dimension; of each row, where A has as many dimensions."""
    return np.asarray(x @ (np.abs(weight) if absolute else weight).swapaxes(-1, -2))


def patches(x: Array, size: list[int], stride: list[int]) -> Array:
    """What each output of a convolution sees, [rows, C, height, width, *size]."""
    every = np.lib.stride_tricks.sliding_window_view(x, tuple(size), axis=(2, 3))
    return every[:, :, :: stride[0], :: stride[1]]


def average(size: list[int], stride: list[int], x: Array, absolute: bool) -> Array:
    """Average pooling of [rows, C, H, W]."""
    return np.asarray(patches(x, size, stride).mean((-1, -2)))


def convolution(weight: Array, bias: Array, stride: list[int], padding: list[int]) -> Map:
    """Of [rows, C, H, W]."""
    shift = bias.reshape(-1, 1, 1)

    def times(x: Array, absolute: bool) -> Array:
        sides = [(0, 0), (0, 0), *[(number, number) for number in padding]]
        seen = patches(np.pad(x, sides), list(weight.shape[2:]), stride).transpose(0, 2, 3, 1, 4, 5)
        rows = seen.reshape(*seen.shape[:3], -1)
        return product(weight.reshape(len(weight), -1), rows, absolute).transpose(0, 3, 1, 2)

    return Map(times, weight[0].size + 2, shift, np.abs(shift))


def batch_norm(eps: float, mean: Array, variance: Array, weight: Array, bias: Array) -> Map:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` of [rows, C, H, W]."""
    check((variance + eps > 0).all(), "variances above -eps")
    slope = (weight / np.sqrt(variance + eps)).reshape(-1, 1, 1)
    of_mean, bias = mean.reshape(-1, 1, 1) * slope, bias.reshape(-1, 1, 1)
    shift = bias - of_mean
    size = np.abs(of_mean) + np.abs(bias) + np.abs(shift)  # summed in either order
    return Map(lambda x, absolute: x * (abs(slope) if absolute else slope), 12, shift, size)


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
        found, k = {}, np.arange(len(self.gains))
        for t in k.tolist():
            for a in range(t + 1):
                found[a, t] = ((a <= k) & (k <= t)) * self.decay ** np.abs(t - k) * self.gains
        return found


Layer = tuple[list[Map], Neurons]  # maps of a step's spikes, or of the image, and what they reach
Network = tuple[list[Layer], list[Map], Array]  # the maps behind all layers, the last one's weight


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
    """Currents I in [low, high] with one train so far, ``v = rest + slope I + offset -+ drift``."""

    low: Any
    high: Any
    slope: Fraction
    offset: Fraction
    drift: Fraction
    train: tuple[int, ...] = ()

    def cut(self, reached: Fraction, spike: int) -> "list[Piece]":
        """The currents whose potential above rest can be at least (at most) so much, if any."""
        needed = reached - self.offset - (self.drift if spike else -self.drift)
        low, high = self.low, self.high
        if self.slope == 0 and (needed > 0 if spike else needed < 0):
            return []
        if self.slope != 0 and bool(spike) == (self.slope > 0):
            low = max(low, needed / self.slope)
        elif self.slope != 0:
            high = min(high, needed / self.slope)
        train = (*self.train, spike)
        return [replace(self, low=low, high=high, train=train)] if low <= high else []


def listed_trains(neurons: Neurons, largest: Fraction, error: Fraction) -> list[Piece]:
    """All trains for constant currents up to ``largest``, of which float32 sees one in each step
    that is at most ``error`` away; in exact arithmetic.
    """
    decay, rest, threshold = map(Fraction, (neurons.decay, neurons.rest, neurons.threshold))
    below, above = Fraction(neurons.below) - rest, Fraction(neurons.above) - rest
    least, zeros = 16 * Fraction(SMALLEST), (Fraction(0), Fraction(0), Fraction(0))
    pieces = [Piece(-math.inf, math.inf, *zeros)]
    for gain in map(Fraction, neurons.gains):
        before, pieces = pieces, []
        for piece in before:
            slope, offset, drift = piece.slope, piece.offset, piece.drift
            size = abs(rest) + abs(slope) * largest + abs(offset) + drift
            terms = decay * size + abs(gain) * largest + abs((1 - decay) * rest)
            charge = Fraction(gamma(16)) * (terms + size + abs(rest)) + least
            reset = Fraction(gamma(4)) * (terms + charge + abs(rest) + abs(threshold)) + least
            slope, offset = decay * slope + gain, decay * offset
            drift = decay * drift + abs(gain) * error + charge
            charged = replace(piece, slope=slope, offset=offset, drift=drift)
            pieces += [replace(one, drift=drift + reset) for one in charged.cut(above, 0)]
            slope, offset, drift = (slope, offset - threshold, drift) if neurons.soft else zeros
            after = partial(replace, slope=slope, offset=offset, drift=drift + reset)
            pieces += map(after, charged.cut(below, 1))
        if len(pieces) > MOST_TRAINS:
            raise ArithmeticError(f"a layer with more than {MOST_TRAINS} trains")
    return sorted(pieces, key=lambda piece: (piece.low, piece.high))


def chained(neurons: Neurons, x: Ball) -> Spikes:
    """Spikes for a current [N, *] that is the same in every step: a chain of trains."""
    low, high = x.ends()
    error = Fraction(x.error.max())
    pieces = listed_trains(neurons, Fraction(max(-low.min(), high.max())) + error, error)
    trains = np.array([piece.train for piece in pieces], dtype=float)
    starts = np.nextafter([float(piece.low) for piece in pieces], -np.inf)
    stops = np.nextafter([float(piece.high) for piece in pieces], np.inf)
    first = np.searchsorted(np.maximum.accumulate(stops), low)
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

    In case a the last reset was just before step a, 0 for none. The charged potential is bounded by
    the step before, and by the exact charges S since the reset, less float32's drift::

        h[t] = decay**(t-a+1) v[a-1] + S[a, t] + rest -+ drift, v[a-1] above rest, 0 if not soft
        h[t] <= decay**(t-k+1) (min(h[k-1], threshold) - rest) + S[k, t] + rest + drift,  a < k <= t
    """
    decay, rest, below, above = neurons.decay, neurons.rest, neurons.below, neurons.above
    nothing = np.zeros(x.centre.shape[1:])
    inputs = np.maximum(*map(np.abs, x.ends())) + x.error
    size, drifts = nothing + abs(rest), [nothing]
    starts, reached = [(nothing, nothing)], [nothing == 0]
    cases: list[Ends] = []
    decided: list[Ends] = []
    for t, gain in enumerate(neurons.gains):
        size = within_float32(abs(gain) * inputs[t] + max(1.0, decay) * size)
        rounded = gamma(16) * (size + (1 + decay) * abs(rest)) + 16 * SMALLEST
        lows, highs = [], []
        for a in range(t + 1):
            drift = (decay * drifts[a] + abs(gain) * x.error[t] + rounded) * (1 + ROUNDED)
            kept = decay ** (t - a + 1) if neurons.soft else 0.0
            lows.append(kept * starts[a][0] + sums[a, t][0] + rest - drift)
            high = kept * starts[a][1] + sums[a, t][1] + rest + drift
            for k in range(a + 1, t + 1):
                silent = np.minimum(cases[k - 1][1][a], above) - rest
                since = decay ** (t - k + 1) * silent + sums[k, t][1]
                high = np.minimum(high, since + rest + drift)
            highs.append(high)
            drifts[a] = drift
        cases.append((np.stack(lows), np.stack(highs)))
        fires, may_fire, here = cases[t][0] >= above, cases[t][1] >= below, np.stack(reached)
        sure, possible = (fires | ~here).all(0), (may_fire & here).any(0)
        decided.append((sure, possible))
        reached = [*(here & ~fires), possible]
        low = np.where(here, cases[t][0], np.inf).min(0)
        high = np.where(here, cases[t][1], -np.inf).max(0)
        starts.append((np.maximum(low, below) - neurons.threshold, high - neurons.threshold))
        size = np.maximum(np.abs(low), np.abs(high)) + abs(rest) + abs(neurons.threshold)
        rounded = gamma(4) * size + 4 * SMALLEST
        drifts.append(drifts[0] if neurons.soft else nothing)
        drifts = [(drift + rounded) * (1 + ROUNDED) for drift in drifts]

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


def bounded_spikes(layers: list[Layer], x: Array, eps: float) -> Spikes:
    """Of the last layer, for all images around some."""
    low = np.maximum(np.nextafter(x - eps, -np.inf), 0.0)
    current = Ball.between(low, np.minimum(np.nextafter(x + eps, np.inf), 1.0))
    (maps, neurons), *others = layers
    for one in maps:
        current = one(current)
    spikes = chained(neurons, current)
    for maps, neurons in others:
        windows = neurons.windows()
        rows = np.stack(list(windows.values()))
        mapped = spikes.sums(rows).rows(-1, keep=2)
        factors = [np.repeat(one.sum(1), len(x)) for one in (rows, np.abs(rows))]
        for one in maps:  # their d covers what is computed of the sums in float64, too
            mapped = one(mapped, *factors)
        ends = map(within_float32, mapped.rows(len(rows), len(x), keep=1).ends())
        sums = dict(zip(windows, zip(*ends, strict=True), strict=True))
        spikes = windowed(neurons, spikes.through(maps), sums)
    return spikes


def margins(spikes: Spikes, maps: list[Map], weight: Array, labels: Array) -> Array:
    """What each label leads by at least, where ``maps`` lead to the logits of a step, the last one
    with this weight. From mean spikes m: ``(W_y - W_k) m + b_y - b_k``, less what float32 rounds.
    """
    logits, T = spikes.through(maps), len(spikes.sure)
    size = np.abs(logits.centre) + logits.radius + logits.error
    error = logits.error.mean(0) + gamma(T + 2) * size.mean(0) + (T + 2) * SMALLEST
    m = spikes.sums(np.full((1, T), 1.0 / T)).rows(-1, keep=2)
    *maps, last = maps
    for one in maps:
        m = one(m)
    row, label = np.arange(len(labels)), labels.reshape(-1, 1)
    gap, shift = weight - weight[label], last.shift - last.shift[label]
    of_gaps = Map(partial(product, gap), last.terms, shift[:, None], np.abs(shift[:, None]))
    most = of_gaps(m.rows(len(row), 1, keep=1)).ends()[1][:, 0]
    lead = most + (1 + ROUNDED) * (error + error[row, labels, None])
    lead[row, labels] = -np.inf
    return np.asarray(-lead.max(1))


def read_network(operations: Any, place: tuple[int, ...], arrays: dict[str, Array]) -> Network:
    """The network of operations as they were recorded for a batch of :data:`SAMPLES` images, which
    have this shape. Values are laid out as [steps, N, *], or as [steps * N, *], first step first: a
    reshape that keeps these leaves every element in its row.
    """
    steps, in_rows, is_done, weight, unused = 1, True, False, None, set(arrays)
    maps: list[Map] = []
    layers: list[Layer] = []

    def weights(*names: str) -> list[Array]:
        unused.difference_update(names)
        is_known = all(arrays[one].dtype == np.float32 for one in names)
        check(is_known and all(np.isfinite(arrays[one]).all() for one in names), "float32 weights")
        return [arrays[one].astype(float) for one in names]

    for given in operations:
        one, is_image, told = None, in_rows and len(place) == 3, f"what fits {place}, got {given}"
        check(not is_done, f"nothing behind the mean over time, got {given}")
        match given:
            case {"op": "reshape", "shape": [*shape]}:
                in_rows = shape[0] == steps * SAMPLES
                kept = [steps * SAMPLES] if in_rows else [steps, SAMPLES]
                new = tuple(shape[len(kept) :])
                check(shape[: len(kept)] == kept and math.prod(new) == math.prod(place), told)
                one = Map(lambda x, _, shape=new: x.reshape(len(x), *shape))  # type: ignore[misc]
            case {"op": "expand", "shape": [int(number), *shape]} if not layers:
                check(steps == 1 <= number and shape == [SAMPLES, *place], told)
                steps, in_rows = number, False
            case {"op": "conv2d", "stride": [int(), int()] as by, "padding": pads} if is_image:
                weight, bias = weights(given["weight"], given["bias"])
                check(min(by) > 0 and weight.shape[1] == place[0], told)
                check(weight.ndim == 4 and bias.shape == weight.shape[:1], told)
                one = convolution(weight, bias, by, pads)
            case {"op": "linear"}:
                weight, bias = weights(given["weight"], given["bias"])
                check(weight.ndim == 2 and bias.shape == weight.shape[:1], told)
                one = Map(partial(product, weight), weight.shape[1] + 2, bias, np.abs(bias))
            case {"op": "batch_norm", "eps": float(eps)} if is_image:
                parts = weights(*(given[key] for key in ("mean", "variance", "weight", "bias")))
                check(all(part.shape == place[:1] for part in parts), told)
                one = batch_norm(eps, *parts)
            case {"op": "avg_pool2d", "size": [a, b] as size, "stride": [_, _] as by} if is_image:
                check(min(a, b, *by) > 0, told)
                one = Map(partial(average, size, by), a * b + 2)
            case {"op": "neuron", "decay": float(decay), "threshold": float(theta)} if maps:
                check(not in_rows, told)
                gains, rest = list(map(float, given["gains"])), given["rest"] or 0.0
                check(np.isfinite([*gains, decay, theta, rest]).all() and decay >= 0, told)
                check(len(gains) == steps <= MOST_STEPS, f"{steps} gains, at most {MOST_STEPS}")
                off, soft = SURPLUS * 2.0**-24 * abs(theta), given["rest"] is None
                node = Neurons(decay, gains, theta, float(rest), soft, theta - off, theta + off)
                layers.append((maps, node))
                maps = []
            case {"op": "mean"} if not in_rows:
                is_done = True
            case _:
                check(False, told)
        if one is not None:
            check(one.terms <= 2**20, "at most a million terms")
            place = one.times(np.zeros((1, *place)), False).shape[1:]
            maps.append(one)
    check(is_done and layers and maps, "neurons, a linear map and a mean over time")
    check(weight is not None and maps[-1].shift is bias, "a linear map at the end")
    check(not unused, f"no other arrays than those of operations, got {sorted(unused)}")
    return layers, maps, np.asarray(weight)


def digest(text: Any, arrays: dict[str, Array]) -> str:
    """SHA-256 of what can be written as JSON, and of arrays by name."""
    found = hashlib.sha256(json.dumps(text, sort_keys=True).encode())
    for name in sorted(arrays):
        one = arrays[name]
        found.update(json.dumps([name, one.dtype.str, one.shape]).encode())
        found.update(np.ascontiguousarray(one).tobytes())
    return found.hexdigest()


def read(path: str) -> tuple[Network, str, float, list[Array]]:
    """The network of a file, its SHA-256, the radius, and images, labels and numbers of images."""
    with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    check(header["format"] == FORMAT, f"the format {FORMAT!r}")
    claim = {key: arrays.pop(key) for key in ("images", "labels", "numbers")}
    name, eps = digest(header["operations"], arrays), float(header["eps"])
    whole = digest([name, header["eps"]], claim)
    check((header["network"], header["claim"]) == (name, whole), "what its SHA-256 is of")
    images, labels, numbers = claim.values()
    check(images.dtype == np.float32 and images.ndim > 1, "images in float32")
    check(((images >= 0) & (images <= 1)).all() and 0 <= eps < 2, "images in [0, 1], eps >= 0")
    check(labels.dtype == numbers.dtype == np.int64, "labels in int64")
    check(labels.shape == numbers.shape == (len(images),), "a label for every image")
    network = read_network(header["operations"], images.shape[1:], arrays)
    check(((labels >= 0) & (labels < len(network[2]))).all(), "labels of classes")
    return network, name, eps, list(claim.values())


def proved(network: Network, images: Array, labels: Array, eps: float) -> Array:
    """What each label leads by at least; -inf or NaN where nothing can be said."""
    found = np.full(len(images), -np.inf)
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        with contextlib.suppress(ArithmeticError), np.errstate(all="ignore"):
            spikes = bounded_spikes(network[0], images[part].astype(float), eps)
            found[part] = margins(spikes, *network[1:], labels[part])
    return found


def main(arguments: list[str]) -> int:
    """Say yes or no for every image of a file."""
    parser = argparse.ArgumentParser(description="Check a certificate of proofs.")
    parser.add_argument("certificate", help="file of Verification.save_certificate")
    parser.add_argument("--network", help="SHA-256 that the network must have")
    options = parser.parse_args(arguments)
    try:
        network, name, eps, (images, labels, numbers) = read(options.certificate)
        check(options.network in (None, name), f"that network, got {name}")
    except Exception as error:  # whatever a file that is none may lead to
        print(f"{options.certificate} is no certificate: {error!r}")
        return 2
    leads = proved(network, images, labels, eps)
    for number, label, lead in zip(numbers, labels, leads, strict=True):
        print(f"image {number}: " + (f"yes, {label} leads by {lead:.3g}" if lead > 0 else "no"))
    accepted = int((leads > 0).sum())
    print(f"{accepted} of {len(leads)} images keep their label within Linf {eps:g}")
    print(f"network {name}")
    return 0 if accepted == len(leads) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
