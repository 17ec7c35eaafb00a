"""Step-by-step bounds of a spiking layer, in real numbers for training and with rounding for
proofs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.ops.limits import at_most
from sj_robust.ops.recurrence import charge, fire
from sj_robust.proofs.rounding import (
    NoBoundsError,
    charge_rounding,
    reset_rounding,
    threshold_rounding,
    within_float32,
)

__all__ = [
    "Centred",
    "Float32Counting",
    "Float32Spiking",
    "Interval",
    "LayerBounds",
    "RealSpiking",
    "SpikingBounds",
]


@dataclass(frozen=True)
class Interval:
    """All values of a tensor between ``low`` and ``high``, element by element."""

    low: Tensor
    high: Tensor

    def size(self) -> Tensor:
        """Largest absolute value."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def width(self) -> Tensor:
        """Distance of the ends."""
        return self.high - self.low

    def widened(self, error: Tensor | float) -> "Interval":
        """With values that are so far outside."""
        return Interval(self.low - error, self.high + error)

    def steps(self) -> "Iterator[Interval]":
        """Of every step, for bounds of [T, N, *]."""
        for low, high in zip(self.low, self.high, strict=True):
            yield Interval(low, high)

    def each(self, function: Callable[[Tensor], Tensor]) -> "Interval":
        """Both ends through a function that keeps their order."""
        return Interval(function(self.low), function(self.high))

    def times(self, factor: float) -> "Interval":
        """Multiplied by a factor >= 0."""
        return Interval(factor * self.low, factor * self.high)

    def holds(self, values: Tensor) -> bool:
        """Whether all values lie inside; NaN does not."""
        if values.shape != self.low.shape:
            return False
        inside = (values >= self.low) & (values <= self.high)
        return bool(inside.all())


@dataclass(frozen=True)
class Centred:
    """All values of a tensor within ``radius`` of ``centre``, element by element."""

    centre: Tensor
    radius: Tensor

    @classmethod
    def of(cls, values: Interval) -> "Centred":
        """The values of an interval."""
        centre = (values.low + values.high) / 2
        radius = (values.high - values.low) / 2
        return cls(centre, radius)

    def each(self, function: Callable[[Tensor], Tensor]) -> "Centred":
        """Both parts through a function that moves elements."""
        return Centred(function(self.centre), function(self.radius))


@dataclass
class LayerBounds:
    """What the bounds say of one spiking layer in a run.

    Attributes:
        last_step: Charged potential and spikes of the last step so far; None before the first one,
            and in runs of joint bounds, which keep every step themselves.
        undecided: Per time step, the number of spikes that may or may not be there, summed over the
            samples; not counted in training.
        width: Per time step, the squared distance between the bounds of the charged potential;
            likewise.
        neurons: Neurons times samples.
        steps: Time steps that have run.
    """

    last_step: tuple[Interval, Interval] | None = None
    undecided: list[float] = field(default_factory=list)
    width: list[float] = field(default_factory=list)
    neurons: int = 0
    steps: int = 0


class SpikingBounds(ABC):
    """One call of a spiking layer on bounds of its currents.

    Spikes are an interval of numbers: ``low`` is 1 where the neuron fires for sure, ``high`` where
    it can. Masks and their gradients are then products, which take a tenth of the time.

    Args:
        neuron: The neuron.
        layer: What earlier calls left, and this one leaves.
    """

    above: float
    """A charged potential that is at least this fires for sure."""

    below: float
    """One that is less than this does not fire."""

    def __init__(self, neuron: Neuron, layer: LayerBounds) -> None:
        """Read how the neuron charges at present."""
        self.neuron = neuron
        self.layer = layer
        self.charging = neuron.charging()
        v_reset = neuron.module.v_reset
        self.soft = v_reset is None
        self.rest = 0.0 if self.soft else float(v_reset)
        self.initial = float(neuron.initial)
        self.threshold = float(neuron.module.v_threshold)
        self.above = self.threshold
        self.below = self.threshold

    def gain_at(self, t: int) -> float:
        """Gain of the current in a step, as float32 holds it."""
        return _number(self.charging.gain_at(t, input_gain=True))

    def tensor_gain_at(self, t: int) -> float | Tensor:
        """The same with its graph."""
        return self.charging.gain_at(t, input_gain=True)

    @abstractmethod
    def step(self, v: Interval, x: Interval) -> tuple[Interval, Interval]:
        """Charged potential and spikes [N, *], for the current [N, *] and the potential before the
        step, which is one number for all neurons before the first one.
        """

    def run(self, x_seq: Interval) -> Interval:
        """Spikes for currents, both [T, N, *]."""
        layer = self.layer
        layer.neurons = x_seq.low[0].numel()
        sure = []
        possible = []
        for x in x_seq.steps():
            v = self.start(x.low) if layer.last_step is None else self.reset(*layer.last_step)
            layer.last_step = self.step(v, x)
            spikes = layer.last_step[1]
            layer.steps += 1
            sure.append(spikes.low)
            possible.append(spikes.high)
        return Interval(torch.stack(sure), torch.stack(possible))

    def start(self, like: Tensor) -> Interval:
        """The potential before the first step, one number for all neurons."""
        initial = like.new_tensor(self.initial)
        return Interval(initial, initial)

    @property
    def head_start(self) -> float:
        """What the first charge has beyond that of a neuron at rest."""
        return self.charging.decay_value * (self.initial - self.rest)

    def charged(
        self, v: Interval, x: Interval, *, decay: float | Tensor, gain: float | Tensor
    ) -> Interval:
        """Potential before firing; a negative gain swaps the ends of the current."""
        charged = partial(charge, decay=decay, gain=gain, v_reset=None)
        if _number(gain) < 0:
            x = Interval(x.high, x.low)
        low = charged(v.low, x.low)
        high = charged(v.high, x.high)
        if self.rest:  # last, as a learned decay sums its gradient in this order
            low = low + (1.0 - decay) * self.rest
            high = high + (1.0 - decay) * self.rest
        return Interval(low, high)

    def reset(self, h: Interval, spikes: Interval) -> Interval:
        """Potential after firing: all that a spike and no spike allow where both are possible."""
        sure = spikes.low
        silent = 1 - spikes.high
        undecided = spikes.high - sure
        if self.soft:
            fired_low = h.low - self.threshold
            either_low = at_most(h.low, self.below - self.threshold)
            low = sure * fired_low + undecided * either_low + silent * h.low
            fired_high = h.high - self.threshold
            silent_high = at_most(h.high, self.above)
            either_high = torch.maximum(silent_high, fired_high)
            high = sure * fired_high + undecided * either_high + silent * silent_high
            return Interval(low, high)
        may_lower = spikes.high * (h.low.detach() > self.rest)
        lowered = torch.maximum(sure, may_lower)
        low = h.low * (1 - lowered)
        highest_undecided = max(self.above, self.rest)
        high = h.high * silent + highest_undecided * undecided
        if self.rest:
            return Interval(low + self.rest * lowered, high + self.rest * sure)
        return Interval(low, high)


class RealSpiking(SpikingBounds):
    """In real numbers and with a graph, for training: surrogates stand for the derivatives of both
    bounds of a spike; as with ``detach_reset``, the reset passes no gradient on.

    Args:
        neuron: The neuron.
        layer: What earlier calls left, and this one leaves.
        surrogate_width: Width w of the derivative in units of the neuron's own: g(z / w) / w stands
            for its g(z).
    """

    def __init__(self, neuron: Neuron, layer: LayerBounds, surrogate_width: float = 1.0) -> None:
        """See the class."""
        super().__init__(neuron, layer)
        self.surrogate_width = surrogate_width

    def step(self, v: Interval, x: Interval) -> tuple[Interval, Interval]:
        """See :class:`SpikingBounds`."""
        gain = self.tensor_gain_at(self.layer.steps)
        h = self.charged(v, x, decay=self.charging.decay, gain=gain)
        return h, h.each(lambda end: fire(end, self.threshold, self.spike))

    def reset(self, h: Interval, spikes: Interval) -> Interval:
        """See :class:`SpikingBounds`."""
        return super().reset(h, spikes.each(Tensor.detach))

    def spike(self, z: Tensor) -> Tensor:
        """A step whose derivative has the width of the bounds."""
        return self.neuron.surrogate.spike(z / self.surrogate_width)

    def derivative(self, z: Tensor) -> Tensor:
        """What :meth:`spike` has for its derivative."""
        width = self.surrogate_width
        return self.neuron.surrogate.derivative(z / width) / width


class Float32Spiking(SpikingBounds):
    """With whatever float32 rounds; all numbers are float64 and without a graph."""

    def __init__(self, neuron: Neuron, layer: LayerBounds) -> None:
        """The threshold is rounded, too."""
        super().__init__(neuron, layer)
        unit = threshold_rounding(self.threshold)
        self.above += unit
        self.below -= unit

    def charged_in_float32(self, v: Interval, x: Interval) -> Interval:
        """Charged potential with what float32 rounds of it."""
        gain = self.gain_at(self.layer.steps)
        h = self.charged(v, x, decay=self.charging.decay_value, gain=gain)
        size = v.size() + abs(gain) * x.size() + abs(self.rest)
        return h.widened(within_float32(charge_rounding(size)))

    def step(self, v: Interval, x: Interval) -> tuple[Interval, Interval]:
        """See :class:`SpikingBounds`."""
        h = self.charged_in_float32(v, x)
        spikes = Interval(fire(h.low, self.above), fire(h.high, self.below))
        undecided = spikes.width().sum()
        width = h.width().square().sum()
        self.layer.undecided.append(float(undecided))
        self.layer.width.append(float(width))
        return h, spikes

    def reset(self, h: Interval, spikes: Interval) -> Interval:
        """See :class:`SpikingBounds`."""
        rounded = reset_rounding(h.size(), self.rest, self.threshold)
        return super().reset(h, spikes).widened(rounded)


class Float32Counting(Float32Spiking):
    """Of a neuron with a soft reset that emits ``s = round(clamp(h / v_threshold, 0, most))``.

    Equation: where both ends give the same spike the potential after it is ``h - s v_threshold``;
    where they do not, it is at least what is left just above a half, ``-v_threshold / 2``, and at
    most ``v_threshold / 2``, or what the ends give if that is further.
    """

    def __init__(self, neuron: Neuron, layer: LayerBounds, most: int) -> None:
        """See the class."""
        super().__init__(neuron, layer)
        if not self.threshold > 0:
            raise NoBoundsError(f"the layer {neuron.name}, whose v_threshold must be > 0")
        self.most = most

    def step(self, v: Interval, x: Interval) -> tuple[Interval, Interval]:
        """See :class:`SpikingBounds`."""
        h = self.charged_in_float32(v, x)
        threshold = self.threshold
        scaled = h.times(1.0 / threshold)
        scaled = scaled.widened(reset_rounding(scaled.size(), 0.0, 0.0))
        spikes = scaled.each(lambda end: end.clamp(0.0, self.most).round())
        undecided = (spikes.low != spikes.high).sum()
        width = h.width().square().sum()
        self.layer.undecided.append(float(undecided))
        self.layer.width.append(float(width))
        return h, spikes

    def reset(self, h: Interval, spikes: Interval) -> Interval:
        """See :class:`SpikingBounds`."""
        threshold = self.threshold
        low = h.low - threshold * spikes.low
        high = h.high - threshold * spikes.high
        half = torch.full_like(low, threshold / 2)
        low_of_either = torch.minimum(low, -half)
        high_of_either = torch.maximum(high, half)
        same = spikes.low == spikes.high
        left = Interval(
            low=torch.where(same, low, low_of_either),
            high=torch.where(same, high, high_of_either),
        )
        size = h.size() + self.most * threshold
        return left.widened(reset_rounding(size, 0.0, threshold))


def _number(value: float | Tensor) -> float:
    """A gain as float32 holds it."""
    return float(torch.as_tensor(value).detach())
