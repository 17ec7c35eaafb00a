"""The reference of the bounds of a spiking layer: the definition of correct results."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sj_robust.ops.limits import at_least, at_most, by_sign
from sj_robust.ops.recurrence import charge
from sj_robust.ops.trains.config import (
    STEP_PARTS,
    Constants,
    Currents,
    StepBounds,
    Trains,
    Windows,
    empty_cases,
)

__all__ = [
    "Spiking",
    "bounded_steps",
    "chain_sums",
    "differentiable_sums",
    "path_sums",
    "range_tables",
    "train_sums",
]


@dataclass(frozen=True)
class _Ends:
    """Smallest and largest values."""

    low: Tensor
    high: Tensor

    def size(self) -> Tensor:
        """Largest absolute value."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def widened(self, error: Tensor) -> "_Ends":
        """With values that are so far outside."""
        return _Ends(self.low - error, self.high + error)

    def within(self, low: Tensor, high: Tensor) -> "_Ends":
        """Cut off at other ends."""
        lowest = torch.maximum(self.low, low)
        highest = torch.minimum(self.high, high)
        return _Ends(lowest, highest)

    def joined(self, other: "_Ends | None") -> "_Ends":
        """Ends that hold others as well, if there are any."""
        if other is None:
            return self
        low = torch.minimum(other.low, self.low)
        high = torch.maximum(other.high, self.high)
        return _Ends(low, high)

    def lowered_from(self, charged: "_Ends", count: "_Ends", threshold: float) -> "_Ends":
        """Cut off at ``charged``, which so many spikes lower by the threshold each."""
        first = threshold * count.low
        second = threshold * count.high
        least = charged.low - torch.maximum(first, second)
        most = charged.high - torch.minimum(first, second)
        return self.within(least, most)


def bounded_steps(currents: Currents, constants: Constants, windows: Windows) -> StepBounds:
    """Bounds of potentials and spikes of a layer from its start on, step by step.

    With sums over time the potential is bounded by them as well. Equation, for the potential h at
    step t above rest, if there was a reset just before a (or a = 0) and none since, S the charges
    since then, and theta the threshold above rest::

        S[a, t] = sum_k lambda^(t-k) p[k] x[k],   k in a..t
        h = lambda^(t-a+1) v[a-1] + S[a, t],      v[a-1] = 0 after a hard reset, else h[a-1] - theta
        h <= lambda^(t-k+1) min(h_hi[a, k-1], theta) + S_hi[k, t]    for a < k <= t: silent at k-1
        h = S[0, t] - theta Q,                    Q the discounted number of spikes, if soft

    S_hi is of the sum as it is: one that is cut off at the threshold would be too small where the
    potential at k-1 is negative.
    """
    v = _start(currents.low[0], constants)
    past = None
    if currents.sums_low is not None:
        past = _Past(currents, constants, windows)
    rows: list[list[Tensor]] = []
    for t, gain in enumerate(constants.gains):
        x = _Ends(currents.low[t], currents.high[t])
        h, error = _charged(v, x, gain, constants)
        if past is not None:
            h, sure, possible = past.decided(t, h, error, gain)
        else:
            sure, possible = _fires(currents, t, h, constants)
            h = _clamped(h, sure, possible, constants)
        spikes = _Ends(sure.to(h.low.dtype), possible.to(h.low.dtype))
        rounding = constants.of_reset(h.size())
        v = _reset(h, spikes, constants).widened(rounding)
        rows.append([h.low, h.high, spikes.low, spikes.high, v.low, v.high])
    parts = map(torch.stack, zip(*rows, strict=True))
    found = dict(zip(STEP_PARTS, parts, strict=True))
    if past is None:
        sure_cases = empty_cases(v.low)
        possible_cases = empty_cases(v.low)
    else:
        sure_cases = torch.stack(past.sure_cases)
        possible_cases = torch.stack(past.possible_cases)
    return StepBounds(**found, sure_cases=sure_cases, possible_cases=possible_cases)


def _start(like: Tensor, constants: Constants) -> _Ends:
    v = torch.full_like(like, constants.rest)
    return _Ends(v, v)


def _charged(v: _Ends, x: _Ends, gain: float, constants: Constants) -> tuple[_Ends, Tensor]:
    """Charged potential, and what of its bounds is float32's rounding."""
    decay = constants.decay
    rest = constants.rest
    lowering = x.high if gain < 0 else x.low
    raising = x.low if gain < 0 else x.high
    low = charge(v.low, lowering, decay=decay, gain=gain, v_reset=None)
    high = charge(v.high, raising, decay=decay, gain=gain, v_reset=None)
    if rest:
        leak = (1.0 - decay) * rest
        low = low + leak
        high = high + leak
    size = v.size() + abs(gain) * x.size() + abs(rest)
    error = constants.of_charge(size)
    return _Ends(low, high).widened(error), error


def _fires(currents: Currents, t: int, h: _Ends, constants: Constants) -> tuple[Tensor, Tensor]:
    """Whether there is a spike at t for sure, and whether there may be one."""
    sure = h.low >= constants.above
    possible = h.high >= constants.below
    if currents.known_low is None or currents.known_high is None:
        return sure, possible
    known_sure = currents.known_low[t] > 0
    known_possible = currents.known_high[t] > 0
    return sure | known_sure, possible & known_possible


def _clamped(h: _Ends, sure: Tensor, possible: Tensor, constants: Constants) -> _Ends:
    """The potential as it agrees with the spikes."""
    fired = h.low.clamp(min=constants.below)
    silent = h.high.clamp(max=constants.above)
    low = torch.where(sure, fired, h.low)
    high = torch.where(possible, h.high, silent)
    return _Ends(low, high)


def _reset(h: _Ends, spikes: _Ends, constants: Constants) -> _Ends:
    """Potential after firing: all that a spike and no spike allow where both are possible."""
    sure = spikes.low
    silent = 1 - spikes.high
    undecided = spikes.high - sure
    rest = constants.rest
    threshold = constants.threshold
    if constants.soft:
        fired_low = h.low - threshold
        either_low = h.low.clamp(max=constants.below - threshold)
        low = sure * fired_low + undecided * either_low + silent * h.low
        fired_high = h.high - threshold
        silent_high = h.high.clamp(max=constants.above)
        either_high = torch.maximum(silent_high, fired_high)
        high = sure * fired_high + undecided * either_high + silent * silent_high
        return _Ends(low, high)
    may_lower = spikes.high * (h.low > rest)
    lowered = torch.maximum(sure, may_lower)
    low = h.low * (1 - lowered)
    highest_undecided = max(constants.above, rest)
    high = h.high * silent + highest_undecided * undecided
    if rest:
        return _Ends(low + rest * lowered, high + rest * sure)
    return _Ends(low, high)


class _Resets:
    """What is known of the last reset before a step, by slot of :class:`Windows`.

    Attributes:
        reached: Whether it can be that one.
        counts: Bounds of the discounted number of spikes before.
    """

    def __init__(self, windows: Windows, like: Tensor) -> None:
        """Before the first step there is one window, and nothing has happened."""
        self.windows = windows
        self.reached = [torch.ones_like(like, dtype=torch.bool)]
        self.counts = [_Ends(torch.zeros_like(like), torch.zeros_like(like))]

    def advance(
        self, t: int, sure: list[Tensor], possible: list[Tensor], decay: float | Tensor
    ) -> None:
        """A step on: by slot, whether there is a spike at t for sure, and whether there may be
        one.
        """
        fires = [may & here for may, here in zip(possible, self.reached, strict=True)]
        some = torch.stack(fires).any(0)
        slots = self.windows.slots(t + 1)
        reached = [torch.zeros_like(some)] * slots
        counts: list[_Ends | None] = [None] * slots
        for slot, count in enumerate(self.counts):
            after = self.windows.after(t, slot)
            reached[after] = reached[after] | (self.reached[slot] & ~sure[slot])
            counts[after] = count.joined(counts[after])
        reached[-1] = some
        counts[-1] = self._with_one_more(torch.stack(fires), some)
        self.reached = reached
        kept = [count for count in counts if count is not None]
        self.counts = [_Ends(decay * count.low, decay * count.high) for count in kept]

    def _with_one_more(self, fires: Tensor, some: Tensor) -> _Ends:
        low = torch.stack([count.low for count in self.counts])
        high = torch.stack([count.high for count in self.counts])
        fewest = torch.where(fires, low, torch.inf).amin(0) + 1
        most = torch.where(fires, high, -torch.inf).amax(0) + 1
        return _Ends(torch.where(some, fewest, 0.0), torch.where(some, most, 0.0))


@dataclass
class _Past:
    """What the steps so far leave to the windows of later ones; see :class:`Windows`.

    Attributes:
        charged: By step and slot, bounds of the charged potential.
        starts: By first step, bounds of the potential that a spike before left; soft resets.
        drift: How far float32's potential can be from the charge equation.
    """

    currents: Currents
    constants: Constants
    windows: Windows
    charged: list[list[_Ends]] = field(default_factory=list)
    sure_cases: list[Tensor] = field(default_factory=list)
    possible_cases: list[Tensor] = field(default_factory=list)
    starts: list[_Ends] = field(default_factory=list)
    drift: Tensor | float = 0.0

    def __post_init__(self) -> None:
        """Before the first step."""
        self.resets = _Resets(self.windows, self.currents.low[0])
        self.starts += self.resets.counts
        steps = len(self.currents.low)
        listed = self.windows.listed(steps)
        self.rows = {window: row for row, window in enumerate(listed)}

    def sums(self, a: int, t: int) -> _Ends:
        """Of a window."""
        low = self.currents.sums_low
        high = self.currents.sums_high
        assert low is not None
        assert high is not None
        row = self.rows[a, t]
        return _Ends(low[row], high[row])

    def decided(self, t: int, h: _Ends, error: Tensor, gain: float) -> tuple[_Ends, Tensor, Tensor]:
        """Charged potential and spikes at t, for the potential as steps bound it."""
        constants = self.constants
        assert self.currents.error is not None
        of_current = abs(gain) * self.currents.error[t]
        self.drift = constants.decay * self.drift + of_current + error
        low = torch.full_like(h.low, torch.inf)
        high = -low
        sure = torch.ones_like(h.low, dtype=torch.bool)
        possible = torch.zeros_like(sure)
        charged = []
        sure_cases = []
        possible_cases = []
        for slot, reached in enumerate(self.resets.reached):
            ends = self._charged(t, slot, h)
            fires, may_fire = _fires(self.currents, t, ends, constants)
            low = torch.where(reached, torch.minimum(low, ends.low), low)
            high = torch.where(reached, torch.maximum(high, ends.high), high)
            sure &= fires | ~reached
            possible |= may_fire & reached
            charged.append(ends)
            sure_cases.append(fires)
            possible_cases.append(may_fire)
        h = _clamped(h, sure, possible, constants).within(low, high)
        self.charged.append(charged)
        self.sure_cases.append(_as_bits(sure_cases))
        self.possible_cases.append(_as_bits(possible_cases))
        self.drift = self.drift + constants.of_reset(h.size())
        fired = h.low.clamp(min=constants.below)
        self.starts.append(_Ends(fired - constants.threshold, h.high - constants.threshold))
        self.resets.advance(t, sure_cases, possible_cases, constants.decay)
        return h, sure, possible

    def _charged(self, t: int, slot: int, h: _Ends) -> _Ends:
        """Bounds of the potential at t for one slot; ``h`` whatever it is."""
        constants = self.constants
        rest = constants.rest
        start = self.windows.start(t, slot)
        found = h
        if start is not None:
            charge = self._since_reset(t, start)
            found = found.within(charge.low, charge.high)
        for k in self.windows.latest(t):
            if start is None and k < t:
                continue
            if start is not None and k <= start:
                continue
            before = self._before(t, slot, k)
            since = self.sums(k, t)
            kept = constants.decay ** (t - k + 1)
            silent = before.high.clamp(max=constants.above) - rest
            most = kept * silent + since.high + rest + self.drift
            least = found.low
            if start is None:
                above_rest = before.low - rest
                least = kept * above_rest + since.low + rest - self.drift
            found = found.within(least, most)
        return self._after_spikes(t, slot, found) if constants.soft else found

    def _since_reset(self, t: int, start: int) -> _Ends:
        """Bounds of the potential at t from what was charged since a reset before ``start``."""
        constants = self.constants
        sums = self.sums(start, t)
        above_rest = _Ends(sums.low + constants.rest, sums.high + constants.rest)
        charge = above_rest.widened(torch.as_tensor(self.drift))
        if not constants.soft:
            return charge
        kept = constants.decay ** (t - start + 1)
        before = self.starts[start]
        low = charge.low + kept * before.low
        high = charge.high + kept * before.high
        return _Ends(low, high)

    def _before(self, t: int, slot: int, k: int) -> _Ends:
        """The charged potential at k - 1 for a slot of step t."""
        earlier = self.charged[k - 1]
        start = self.windows.start(t, slot)
        if start is not None:
            return earlier[self.windows.slot(k - 1, start)]
        members = [earlier[member] for member in self.windows.members(t)]
        found = members[0]
        for member in members[1:]:
            found = member.joined(found)
        return found

    def _after_spikes(self, t: int, slot: int, found: _Ends) -> _Ends:
        """Bounds of the potential from all charges and the number of spikes before."""
        whole = self.sums(0, t).widened(torch.as_tensor(self.drift))
        return found.lowered_from(whole, self.resets.counts[slot], self.constants.threshold)


def _as_bits(flags: list[Tensor]) -> Tensor:
    """Flags of slots as the bits of one number."""
    found = torch.zeros_like(flags[0], dtype=torch.int16)
    for number, flag in enumerate(flags):
        found |= flag.to(torch.int16) << number
    return found


def train_sums(weights: Tensor, trains: Trains, windows: Windows) -> tuple[Tensor, Tensor]:
    """Least and largest ``sum_t weights[f, t] s[t]`` over the trains of M neurons, [F, M] each, of
    the steps that have weights.
    """
    steps = weights.shape[1]
    low = weights @ trains.sure[:steps]
    high = low.clone()
    index = (trains.place >= 0).nonzero().squeeze(1)
    if not index.numel():
        return low, high
    if trains.spikes is None:
        place = trains.place[index].long()
        sure = trains.sure_cases[:steps, place]
        possible = trains.possible_cases[:steps, place]
        least, most = path_sums(weights, sure, possible, windows)
    else:
        assert trains.first is not None
        assert trains.last is not None
        first = trains.first[index]
        last = trains.last[index]
        least, most = chain_sums(weights, trains.spikes, first, last)
        up, down = by_sign(weights)
        sure = trains.sure[:steps, index]
        possible = trains.possible[:steps, index]
        least = torch.maximum(least, up @ sure + down @ possible)
        most = torch.minimum(most, up @ possible + down @ sure)
    low[:, index] = least
    high[:, index] = most
    return low, high


def path_sums(
    weights: Tensor, sure: Tensor, possible: Tensor, windows: Windows
) -> tuple[Tensor, Tensor]:
    """Least and largest weighted sums over all paths through the cases stay and fire, [F, O].

    Equation, for weights w, with ``rest[T] = 0`` and the bounds at ``rest[0]`` before the first
    step, t falling and a the last reset::

        fire = w[t] + rest[t + 1],   stay = rest[a]
        rest[a] = stay if there can be no spike, fire if it is sure, else min (max) of both
    """
    weighted = weights.any(0).nonzero()
    steps = int(weighted.max()) + 1 if len(weighted) else 0
    ends = []
    for better in (torch.minimum, torch.maximum):
        nothing = weights.new_zeros(len(weights), sure.shape[1])
        rest = [nothing] * windows.slots(steps)
        for t in reversed(range(steps)):
            fire = rest[-1] + weights[:, t, None]
            now = []
            for slot in range(windows.slots(t)):
                stay = rest[windows.after(t, slot)]
                fires = (sure[t] >> slot & 1).bool()
                may_fire = (possible[t] >> slot & 1).bool()
                either = torch.where(fires, fire, better(fire, stay))
                now.append(torch.where(may_fire, either, stay))
            rest = now
        ends.append(rest[0])
    return ends[0], ends[1]


def chain_sums(
    weights: Tensor, spikes: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """Least and largest weighted sums over the trains first..last, [F, O].

    The least of a range is that of two ranges of 2**k trains that cover it, which a table holds
    for all k.
    """
    level, second = _cover(first, last)
    levels = int(level.max()) if level.numel() else 0
    tables = range_tables(weights, spikes, levels)
    ends = []
    for table, pick in zip(tables, (torch.minimum, torch.maximum), strict=True):
        flat = table.movedim(2, 0).flatten(1)
        start = level * len(spikes)
        one = flat[:, start + first]
        other = flat[:, start + second]
        ends.append(pick(one, other))
    return ends[0], ends[1]


def _cover(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Level k of two ranges of 2**k trains that cover first..last, and where the second begins."""
    width = last - first + 1
    level = torch.log2(width.double()).long()
    return level, last + 1 - 2**level


def range_tables(weights: Tensor, spikes: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Least and largest sums over 2**k trains from each one on, [levels + 1, J, F]."""
    values = spikes[:, : weights.shape[1]] @ weights.T
    found = []
    for pick in (torch.minimum, torch.maximum):
        table = [values]
        for k in range(levels):
            shifted = table[-1].roll(-(2**k), 0)  # what comes round is not asked for
            table.append(pick(table[-1], shifted))
        found.append(torch.stack(table))
    return found[0], found[1]


@dataclass(frozen=True)
class Spiking:
    """A neuron in training.

    Attributes:
        threshold: Above rest.
        soft: Whether a spike lowers the potential by the threshold.
        spike: A step with the derivative of the bounds.
    """

    threshold: float
    soft: bool
    spike: Callable[[Tensor], Tensor]


def differentiable_sums(
    sums: tuple[Tensor, Tensor], weights: Tensor, powers: Tensor, neuron: Spiking, windows: Windows
) -> tuple[Tensor, Tensor]:
    """Least and largest ``sum_t weights[f, t] s[t]`` of M neurons with a graph, [F, M] each, from
    bounds of their sums over time.

    Equation: that of :func:`bounded_steps` without rounding, and of :func:`path_sums` with products
    instead of cases, ``rest[a] = stay + possible (best - stay) + sure (fire - best)``. As with
    ``detach_reset``, the reset passes no gradient on.

    Args:
        sums: Smallest and largest sum of every window by row, [W, M].
        weights: Of all steps, [F, T].
        powers: Of the decay, from 0 to T.
        neuron: The neuron.
        windows: Which windows are distinguished.
    """
    past = _TrainedPast(sums, powers, neuron, windows)
    for t in range(weights.shape[1]):
        past.step(t)
    least = past.over_paths(weights, torch.minimum)
    most = past.over_paths(weights, torch.maximum)
    return least, most


@dataclass(frozen=True)
class _Cases:
    """What can happen at a step, by slot, [slots, M].

    Attributes:
        sure: Whether there is a spike for sure, 0 or 1.
        possible: Whether there may be one.
        low: Smallest potential above rest.
        high: Largest.
    """

    sure: Tensor
    possible: Tensor
    low: Tensor
    high: Tensor


class _TrainedPast:
    """The cases of a layer's steps so far; see :class:`_Past`."""

    def __init__(
        self, sums: tuple[Tensor, Tensor], powers: Tensor, neuron: Spiking, windows: Windows
    ) -> None:
        self.sums = sums
        self.powers = powers
        self.neuron = neuron
        self.windows = windows
        self.cases: list[_Cases] = []
        rows = windows.listed(len(powers) - 1)
        self.rows = {window: row for row, window in enumerate(rows)}
        self.resets = _Resets(windows, sums[0][0])
        self.starts = self.resets.counts

    def step(self, t: int) -> None:
        """Whether there is a spike at t, for every slot."""
        low = []
        high = []
        for slot in range(self.windows.slots(t)):
            ends = self._charged(t, slot)
            low.append(ends.low)
            high.append(ends.high)
        charged = _Ends(torch.stack(low), torch.stack(high))
        cases = _Cases(
            sure=self.neuron.spike(charged.low - self.neuron.threshold),
            possible=self.neuron.spike(charged.high - self.neuron.threshold),
            low=charged.low,
            high=charged.high,
        )
        self.cases.append(cases)
        if self.neuron.soft:
            self.starts = [*self.starts, self._after_a_spike(cases)]
            sure, possible = (part.detach() > 0 for part in (cases.sure, cases.possible))
            self.resets.advance(t, [*sure], [*possible], self.powers[1].detach())

    def _of_window(self, a: int, t: int) -> _Ends:
        row = self.rows[a, t]
        low, high = self.sums
        return _Ends(low[row], high[row])

    def _charged(self, t: int, slot: int) -> _Ends:
        """Bounds of the potential at t above rest for one slot."""
        start = self.windows.start(t, slot)
        if start is None:
            return self._joined(t)
        found = self._of_window(start, t)
        if self.neuron.soft and start > 0:
            before = self.starts[start]
            kept = self.powers[t - start + 1]
            low = found.low + kept * before.low
            found = _Ends(low, found.high + kept * before.high)
        high = found.high
        for k in self.windows.latest(t):
            if k > start:
                slot_then = self.windows.slot(k - 1, start)
                earlier = self.cases[k - 1].high[slot_then]
                high = torch.minimum(high, self._since(t, k, earlier))
        found = _Ends(found.low, high)
        if not self.neuron.soft or start == 0:
            return found
        return self._after_spikes(t, slot, found)

    def _since(self, t: int, k: int, before: Tensor) -> Tensor:
        """Largest potential at t from that at k - 1, where there was no spike, and what was
        charged since.
        """
        silent = at_most(before, self.neuron.threshold)
        kept = self.powers[t - k + 1] * silent
        return kept + self._of_window(k, t).high

    def _joined(self, t: int) -> _Ends:
        """The same of the slot that holds several windows, from the step before."""
        earlier = self.cases[t - 1]
        low = earlier.low[1]
        high = earlier.high[1]
        for member in self.windows.members(t)[1:]:
            low = torch.minimum(low, earlier.low[member])
            high = torch.maximum(high, earlier.high[member])
        least = self.powers[1] * low + self._of_window(t, t).low
        found = _Ends(least, self._since(t, t, high))
        return self._after_spikes(t, 1, found) if self.neuron.soft else found

    def _after_spikes(self, t: int, slot: int, found: _Ends) -> _Ends:
        """Cut off by all charges and the number of spikes before."""
        whole = self._of_window(0, t)
        return found.lowered_from(whole, self.resets.counts[slot], self.neuron.threshold)

    def _after_a_spike(self, cases: _Cases) -> _Ends:
        """Bounds of the potential, whichever slot fires."""
        reached = torch.stack(self.resets.reached)
        threshold = self.neuron.threshold
        least = torch.where(reached, cases.low, torch.inf).amin(0)
        most = torch.where(reached, cases.high, -torch.inf).amax(0)
        return _Ends(at_least(least, threshold) - threshold, most - threshold)

    def over_paths(self, weights: Tensor, better: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The dynamic program of :func:`path_sums`, with products instead of cases."""
        steps = weights.shape[1]
        like = self.cases[0].sure
        rest = like.new_zeros(self.windows.slots(steps), len(weights), like.shape[1])
        for t in reversed(range(steps)):
            cases = self.cases[t]
            sure = cases.sure.unsqueeze(1)
            possible = cases.possible.unsqueeze(1)
            fire = weights[:, t, None] + rest[-1]
            after = [self.windows.after(t, slot) for slot in range(len(sure))]
            stay = rest[after]
            best = better(fire.expand_as(stay), stay)
            gained = possible * (best - stay)
            forced = sure * (fire - best)
            rest = stay + gained + forced
        return rest[0]
