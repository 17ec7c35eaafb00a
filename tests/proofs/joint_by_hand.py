"""Joint bounds of a small network from the formulas alone, neuron by neuron, with torch's autograd
and nothing of the package.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from training.step_by_hand import Triangle

FAR = 1e9
CLOSE = 1e-9


def zero():
    return torch.zeros((), dtype=torch.float64)


@dataclass
class Piece:
    """Currents that give a train, and slope and shift of the potential in every step, which rests
    at 0 and fires at 1.
    """

    low: float
    high: float
    slope: torch.Tensor
    shift: torch.Tensor
    slopes: tuple = ()
    shifts: tuple = ()
    train: tuple = ()

    def after(self, slope, shift, *, soft):
        """What is left of it where the neuron stays silent, and where it fires."""
        cut = (1 - float(shift.detach())) / float(slope.detach())
        below = (self.low, min(self.high, cut))
        above = (max(self.low, cut), self.high)
        silent, fires = below, above
        if slope < 0:
            silent, fires = above, below
        found = []
        for ends, spike in ((silent, 0.0), (fires, 1.0)):
            low, high = ends
            kept = 1.0 if soft else 1 - spike
            lost = spike if soft else 0.0
            piece = Piece(
                low=low,
                high=high,
                slope=slope * kept,
                shift=shift * kept - lost,
                slopes=(*self.slopes, slope),
                shifts=(*self.shifts, shift),
                train=(*self.train, spike),
            )
            if low <= high + CLOSE:
                found.append(piece)
        return found


def pieces(decay, gains, *, soft):
    """All trains of a constant current, in the order of the currents."""
    found = [Piece(-FAR, FAR, zero(), zero())]
    for gain in gains:
        now = []
        for piece in found:
            slope = decay * piece.slope + gain
            shift = decay * piece.shift
            now += piece.after(slope, shift, soft=soft)
        found = now
    return sorted(found, key=lambda piece: (piece.low, piece.high))


def first_difference(one, other):
    for t, pair in enumerate(zip(one, other, strict=True)):
        if pair[0] != pair[1]:
            return t
    raise AssertionError("equal trains")


def opened(gates):
    """How many are open."""
    return int(sum(gates).detach())


def least(values, a, b):
    if a > b:
        return values[a]
    some = values[a : b + 1]
    return some[some.argmin()]


def most(values, a, b):
    if a > b:
        return values[b]
    some = values[a : b + 1]
    return some[some.argmax()]


def of_gates(end, values, below, above):
    """An end of the values that is a sum over gates, each of which moves it by what opening it
    changes.
    """
    a = opened(below)
    b = max(a, opened(above))
    total = end(values, a, b)
    for j, (low, high) in enumerate(zip(below, above, strict=True)):
        moved = end(values, j + 1, b) - end(values, j, b)
        total = total + (low - low.detach()) * moved.detach()
        moved = end(values, a, j + 1) - end(values, a, j)
        total = total + (high - high.detach()) * moved.detach()
    return total


class Network:
    """Linear - neuron - linear - neuron - linear with threshold 1 and hard resets to 0, or a soft
    one in the first layer.
    """

    def __init__(self, net, T, width):
        self.first = net[0]
        self.second = net[2]
        self.last = net[4]
        self.T = T
        self.width = width
        self.soft = net[1].v_reset is None
        self.decays = []
        self.gains = []
        for node in (net[1], net[3]):
            self.decays.append(self.decay_of(node))
            self.gains.append(self.gains_of(node))

    def decay_of(self, node):
        if hasattr(node, "w"):
            return 1 - node.w.sigmoid()
        return torch.tensor(1 - 1 / node.tau)

    def gains_of(self, node):
        """Without decay_input, the gain is 1."""
        ones = torch.ones(self.T, dtype=torch.float64)
        return getattr(node, "input_gain", ones)

    def fire(self, z):
        return Triangle.apply(z, self.width)

    def chain(self, low, high, weights):
        """Bounds of the weighted sums of a neuron of the first layer, one after the other."""
        found = pieces(self.decays[0], self.gains[0], soft=self.soft)
        below = []
        above = []
        for piece, after in pairwise(found):
            step = first_difference(piece.train, after.train)
            slope = piece.slopes[step]
            left = piece.shifts[step] - 1
            sign = slope.sign()
            below.append(self.fire(sign * (slope * low + left)))
            above.append(self.fire(sign * (slope * high + left)))
        trains = [piece.train for piece in found]
        trains = torch.tensor(trains, dtype=torch.float64)
        lows = []
        highs = []
        for row in weights:
            values = trains @ row
            lows.append(of_gates(least, values, below, above))
            highs.append(of_gates(most, values, below, above))
        return torch.stack(lows), torch.stack(highs)

    def windows(self):
        """First and last step."""
        for t in range(self.T):
            for a in range(t + 1):
                yield a, t

    def weights(self):
        """Of every step in the potential of the second layer, by window."""
        decay = self.decays[1]
        rows = []
        for a, t in self.windows():
            row = [zero() for _ in range(self.T)]
            for k in range(a, t + 1):
                row[k] = decay ** (t - k) * self.gains[1][k]
            rows.append(torch.stack(row))
        return rows

    def lead(self, x, y, eps):
        low = (x - eps).clamp(min=0)
        high = (x + eps).clamp(max=1)
        centre = self.first((low + high) / 2)
        radius = (high - low) / 2 @ self.first.weight.abs().T
        rows = []
        for middle, spread in zip(centre, radius, strict=True):
            counts = self.counts(middle - spread, middle + spread)
            rows.append(self.logits(*counts))
        lead = torch.stack(rows)
        number = torch.arange(len(x))
        return lead[number, y]

    def counts(self, low, high):
        """Bounds of the mean spikes of the second layer, for the currents of the first."""
        weights = self.weights()
        lows = []
        highs = []
        for ends in zip(low, high, strict=True):
            least_sums, most_sums = self.chain(*ends, weights)
            lows.append(least_sums)
            highs.append(most_sums)
        lows = torch.stack(lows, 1)
        highs = torch.stack(highs, 1)
        shift = torch.stack(weights).sum(1, keepdim=True)
        middle = (lows + highs) / 2 @ self.second.weight.T
        middle = middle + shift * self.second.bias
        spread = (highs - lows) / 2 @ self.second.weight.abs().T
        return self.paths(middle - spread, middle + spread)

    def paths(self, low, high):
        decay = self.decays[1]
        lowest = dict(zip(self.windows(), low, strict=True))
        alone = dict(zip(self.windows(), high, strict=True))
        sure = {}
        possible = {}
        highest = {}
        for a, t in self.windows():
            top = alone[a, t]
            for k in range(a + 1, t + 1):
                silent = highest[a, k - 1].clamp(max=1)
                since = decay ** (t - k + 1) * silent + alone[k, t]
                top = torch.minimum(top, since)
            highest[a, t] = top
            sure[a, t] = self.fire(lowest[a, t] - 1)
            possible[a, t] = self.fire(top - 1)

        def rest(better, t, a):
            if t == self.T:
                return torch.zeros_like(low[0])
            fires = 1 / self.T + rest(better, t + 1, t + 1)
            stays = rest(better, t + 1, a)
            silent = (1 - possible[a, t]) * stays
            spiking = sure[a, t] * fires
            either = possible[a, t] - sure[a, t]
            return silent + spiking + either * better(fires, stays)

        return rest(torch.minimum, 0, 0), rest(torch.maximum, 0, 0)

    def logits(self, low, high):
        """What every class leads every label by at most, [labels, classes]."""
        weight = self.last.weight
        gap = weight.unsqueeze(0) - weight.unsqueeze(1)
        centre = gap @ ((low + high) / 2)
        radius = gap.abs() @ ((high - low) / 2)
        bias = self.last.bias
        shift = bias.unsqueeze(0) - bias.unsqueeze(1)
        return centre + radius + shift
