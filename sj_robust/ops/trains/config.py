"""Constants, inputs and outputs of the bounds of a spiking layer."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import SurrogateKind

__all__ = [
    "STEP_PARTS",
    "BoundsBackend",
    "ChainGates",
    "ChainPlaces",
    "Constants",
    "Currents",
    "StepBounds",
    "Trained",
    "Trains",
    "Windows",
    "empty_cases",
]


BoundsBackend = Literal["auto", "reference"]
"""What computes sums for training: ``"auto"`` is the compiled kernel where it can."""


@dataclass(frozen=True)
class Constants:
    """Numbers of a neuron and of what float32 rounds.

    Attributes:
        decay: Share of the potential that a step keeps.
        gains: Gain of the current by step.
        rest: Potential at the start, and after a spike if the reset is hard.
        threshold: Potential at which there is a spike.
        above: A charged potential that is at least this fires for sure.
        below: One that is less than this does not fire.
        soft: Whether a spike lowers the potential by the threshold.
        charge_unit: Relative error of a charge.
        charge_least: What it may be off whatever its terms are.
        reset_unit: Relative error of a reset.
        reset_least: What it may be off whatever its terms are.
    """

    decay: float
    gains: tuple[float, ...]
    rest: float
    threshold: float
    above: float
    below: float
    soft: bool
    charge_unit: float
    charge_least: float
    reset_unit: float
    reset_least: float

    def of_charge(self, size: Tensor) -> Tensor:
        """How far float32's charged potential can be from the exact one."""
        return self.charge_unit * size + self.charge_least

    def of_reset(self, size: Tensor) -> Tensor:
        """How far float32's potential after the reset can be from the exact one."""
        total = size + abs(self.rest) + abs(self.threshold)
        return self.reset_unit * total + self.reset_least


@dataclass(frozen=True)
class Currents:
    """Bounds of the currents of M neurons in float64.

    Attributes:
        low: Smallest current by step, [T, M].
        high: Largest.
        known_low: Spikes that are sure from elsewhere, 0 or 1, [T, M]; None if none is known.
        known_high: Spikes that are possible, likewise.
        error: How far float32's current can be from the exact one, [T, M]; None without windows.
        sums_low: Smallest sum of every window by row, [W, M]; None without windows.
        sums_high: Largest.
    """

    low: Tensor
    high: Tensor
    known_low: Tensor | None = None
    known_high: Tensor | None = None
    error: Tensor | None = None
    sums_low: Tensor | None = None
    sums_high: Tensor | None = None


@dataclass(frozen=True)
class StepBounds:
    """Bounds of every step of M neurons, [T, M].

    Attributes:
        h_low: Smallest charged potential.
        h_high: Largest.
        sure: Whether there is a spike for sure, 0 or 1 in float64.
        possible: Whether there may be one, likewise.
        v_low: Smallest potential after the reset.
        v_high: Largest.
        sure_cases: By bit, whether the spike is sure for a slot of :class:`Windows`, int16; empty
            without windows.
        possible_cases: Whether it is possible, likewise.
    """

    h_low: Tensor
    h_high: Tensor
    sure: Tensor
    possible: Tensor
    v_low: Tensor
    v_high: Tensor
    sure_cases: Tensor
    possible_cases: Tensor


STEP_PARTS = ("h_low", "h_high", "sure", "possible", "v_low", "v_high")
"""Fields of :class:`StepBounds` that are there without windows."""


@dataclass(frozen=True)
class Trains:
    """The spike trains that bounds leave M neurons.

    Attributes:
        sure: Whether there is a spike for sure, 0 or 1, [T, M].
        possible: Whether there may be one.
        place: Number of a neuron among those that have cases, [M]; -1 where all spikes are decided.
        sure_cases: Of those, [T, O]; see :class:`StepBounds`.
        possible_cases: Likewise.
        spikes: Trains of a constant current, [J, T]; None if there are none.
        first: Number of the first train that is possible, [M].
        last: Number of the last one.
    """

    sure: Tensor
    possible: Tensor
    place: Tensor
    sure_cases: Tensor
    possible_cases: Tensor
    spikes: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None


@dataclass(frozen=True)
class Trained:
    """A neuron in training whose surrogate every kernel knows.

    Attributes:
        threshold: Above rest.
        surrogate: Kind of its surrogate.
        alpha: Sharpness.
        width: Width of the derivative of bounds in units of the neuron's own.
    """

    threshold: float
    surrogate: SurrogateKind
    alpha: float
    width: float


@dataclass(frozen=True)
class ChainGates:
    """What the gradient of sums over chains of trains needs.

    Attributes:
        low: Smallest current, [M].
        high: Largest.
        first: Number of the first train, [M].
        last: Number of the last one.
        scale: Slope of the potential that meets the threshold at a gate, [G].
        shift: What is left of that potential, [G].
        to_last: What a gate that opens at the lower current changes in every sum, by last train,
            [J, G, 2 F].
        from_first: The same of the upper current, by first train.
    """

    low: Tensor
    high: Tensor
    first: Tensor
    last: Tensor
    scale: Tensor
    shift: Tensor
    to_last: Tensor
    from_first: Tensor


@dataclass(frozen=True)
class ChainPlaces:
    """What the gradient of the trains' values needs.

    Attributes:
        least: Number of the train with the least value of a..b, [J, J, F].
        most: Of that with the largest.
        centred: Whether the sums are centres and radii.
    """

    least: Tensor
    most: Tensor
    centred: bool


@dataclass(frozen=True)
class Windows:
    """The windows that are distinguished at a step, by their last reset: none so far, the latest
    ones, and all between them as one.

    A slot is the last reset just before step a: slot 0 is a = 0, before which there was none. Up to
    step ``kept`` slot s is a = s. Later slot 1 is all of 1..t - kept, of which no sums are bounded,
    and the slots behind it are t - kept + 1, ..., t. So the number of slots, and of the sums of a
    step, does not grow with the number of steps.

    Attributes:
        kept: Latest windows of a step.
    """

    kept: int

    def slots(self, t: int) -> int:
        """Slots of a step."""
        return min(t, self.kept + 1) + 1

    def start(self, t: int, slot: int) -> int | None:
        """First step of a slot's window; None for the slot that holds several."""
        if slot == 0 or t <= self.kept:
            return slot
        return None if slot == 1 else t - self.kept - 1 + slot

    def slot(self, t: int, start: int) -> int:
        """The slot of a window by its first step."""
        if start == 0 or t <= self.kept:
            return start
        return max(1, start - t + self.kept + 1)

    def after(self, t: int, slot: int) -> int:
        """The slot of step t + 1 if there is no spike at t."""
        return slot if t <= self.kept or slot < 2 else slot - 1

    def latest(self, t: int) -> range:
        """First steps of the windows with sums that end at t, without that of slot 0."""
        return range(max(1, t - self.kept + 1), t + 1)

    def listed(self, steps: int) -> list[tuple[int, int]]:
        """Windows (a, t) that have sums, by row: the single steps, then the longer ones."""
        found = [(t, t) for t in range(steps)]
        for t in range(1, steps):
            found.append((0, t))
            found += [(a, t) for a in self.latest(t) if a < t]
        return found

    def members(self, t: int) -> range:
        """Slots of step t - 1 that are part of slot 1 of step t > kept."""
        return range(1, self.slot(t - 1, t - self.kept) + 1)


def empty_cases(like: Tensor) -> Tensor:
    """No cases."""
    return like.new_empty(0, dtype=torch.int16)
