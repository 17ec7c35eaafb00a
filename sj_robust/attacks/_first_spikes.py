"""Spikes that an image drives directly: their currents, and where these change a spike train."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.attacks.call import wide
from sj_robust.core.broadcast import along
from sj_robust.core.host import first_argument, functional, is_neuron
from sj_robust.core.preserved import preserved

__all__ = ["FirstSpikes", "first_spikes"]

_LARGEST_IMAGE = 2**14
"""Elements of an image up to which the map to the currents is found, by an image per element."""
_ENTRIES = 2**28  # of that map, zeros included; of a larger one some neurons are left out
_AT_ONCE = 2**24  # entries that are held while it is being found
_GRID = 2**16  # currents among which those that change a spike train are bracketed
_BISECTIONS = 30
_AFFINE = 1e-4
"""Share of the largest current by which an affine map may be off, being computed in float32."""
_NOTHING = 1e-5  # weights of a smaller share of the largest one are what rounding leaves of a zero


@dataclass(frozen=True)
class FirstSpikes:
    """Neurons whose currents are affine in the image, the same in every time step.

    Equation: ``current[d] = bias[d] + sum_k weight[d, k] x[index[d, k]]``; the spikes of a neuron
    change where its current passes one of the ``thresholds``, and nowhere else.

    Attributes:
        index: Elements of the image that each neuron sees, [D, K]; padded with 0.
        weight: Their weights, [D, K]; padded with 0.
        bias: Current of a black image, [D].
        thresholds: Currents in ascending order, minus and plus infinity at the ends, [M].
    """

    index: Tensor
    weight: Tensor
    bias: Tensor
    thresholds: Tensor

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return len(self.bias)


def first_spikes(model: object, x: Tensor) -> FirstSpikes | None:
    """The first spiking layer that a forward of images like ``x`` [N, ...] reaches.

    None where that says nothing of its spikes: there is no such layer, it does not see each image
    once, its current is not affine in the image or changes over time, or its neurons differ from
    each other.
    """
    if not isinstance(model, nn.Module) or x[0].numel() > _LARGEST_IMAGE:
        return None
    seen = _Seen(model)
    if not seen.is_affine(x):
        return None
    table = _table(seen, x)
    thresholds = _thresholds(seen, *_reach(table))
    if thresholds is None:
        return None
    return FirstSpikes(
        index=table.index,
        weight=wide(table.weight),
        bias=wide(table.bias),
        thresholds=wide(thresholds),
    )


class _FoundError(Exception):
    """The rest of the network need not run."""


class _Seen:
    """What reaches the first spiking layer of a network."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layer: Any = None
        self.inputs: list[Tensor] = []
        self.steps = 0

    def is_affine(self, x: Tensor) -> bool:
        """Whether the current is there, the same in every step, and affine in the image."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, *x.shape[1:])
        ends = torch.rand(shape, generator=generator).to(x)
        middle = ends.mean(0, keepdim=True)
        with self._hooks(ends_the_run=False):
            self.model(torch.cat([ends, middle]))
        if self.layer is None:
            return False
        steps = self._steps()
        self.steps = len(steps)
        if steps.shape[1] != len(ends) + 1:  # a network that enlarges its batch, to average over it
            return False
        first, other, between = steps[0].double()
        middle_of_currents = (first + other) / 2
        off = (between - middle_of_currents).abs().max()
        changed = (steps - steps[:1]).abs().max()
        allowed = _AFFINE * steps.abs().max()
        return bool(torch.maximum(off, changed) <= allowed)

    def currents(self, images: Tensor) -> Tensor:
        """Currents of the first step, [N, neurons]."""
        with self._hooks(ends_the_run=True), suppress(_FoundError):
            self.model(images)
        return self._steps()[0].flatten(1)

    def _steps(self) -> Tensor:
        """Inputs of the last run, [T, N, *]."""
        joined = torch.cat if self.layer.step_mode == "m" else torch.stack
        steps: Tensor = joined(self.inputs)
        return steps

    @contextmanager
    def _hooks(self, *, ends_the_run: bool) -> Iterator[None]:
        self.layer = None
        self.inputs = []

        def called(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.layer is None:
                self.layer = layer
            if self.layer is layer:
                self.inputs.append(first_argument(args, kwargs).detach().clone())
                if ends_the_run:
                    raise _FoundError

        layers = [module for module in self.model.modules() if is_neuron(module)]
        hooks = [layer.register_forward_pre_hook(called, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class _Table:
    """The map from the image to the currents."""

    index: Tensor
    weight: Tensor
    bias: Tensor


def _table(seen: _Seen, x: Tensor) -> _Table:
    """The map, column by column: the currents of an image with one white element."""
    elements = x[0].numel()
    of_black = seen.currents(torch.zeros_like(x[:1]))[0]
    stride = math.ceil(elements * len(of_black) / _ENTRIES)  # of the neurons that are kept
    bias = of_black[::stride]
    columns = []
    neurons = []
    weights = []
    every = torch.arange(elements, device=x.device)
    for numbers in torch.split(every, _AT_ONCE // len(bias) + 1):
        white = torch.zeros(len(numbers), elements, dtype=x.dtype, device=x.device)
        white.scatter_(1, numbers[:, None], 1.0)
        currents = seen.currents(white.view(-1, *x.shape[1:]))
        change = currents[:, ::stride] - bias
        size = change.abs()
        column, neuron = (size > _NOTHING * size.max()).nonzero(as_tuple=True)
        columns.append(numbers[column])
        neurons.append(neuron)
        weights.append(change[column, neuron])
    return _by_neuron(torch.cat(columns), torch.cat(neurons), torch.cat(weights), bias)


def _by_neuron(column: Tensor, neuron: Tensor, weight: Tensor, bias: Tensor) -> _Table:
    """Entries of the map in any order as rows of one length."""
    order = neuron.argsort(stable=True)
    neuron = neuron[order]
    count = torch.bincount(neuron, minlength=len(bias))
    begin = count.cumsum(0) - count
    place = torch.arange(len(neuron), device=neuron.device) - begin[neuron]
    shape = (len(bias), max(1, int(count.max())))
    index = torch.zeros(shape, dtype=torch.int64, device=bias.device)
    weights = torch.zeros(shape, dtype=bias.dtype, device=bias.device)
    index[neuron, place] = column[order]
    weights[neuron, place] = weight[order]
    return _Table(index, weights, bias)


def _reach(table: _Table) -> tuple[float, float]:
    """Smallest and largest current of all images in [0, 1]."""
    lowest = table.bias + table.weight.clamp(max=0).sum(1)
    highest = table.bias + table.weight.clamp(min=0).sum(1)
    return float(lowest.min()), float(highest.max())


def _thresholds(seen: _Seen, lowest: float, highest: float) -> Tensor | None:
    """Constant currents at which the spike train of a neuron changes; None if neurons differ."""
    like = seen.inputs[0]
    current = torch.linspace(lowest, highest, _GRID, dtype=like.dtype, device=like.device)
    with preserved(seen.layer):
        try:
            train = _trains(seen, current)
        except RuntimeError:  # neurons with values of their own refuse another number of neurons
            return None
        if train.shape[1:] != current.shape:
            return None
        return _bisected(current, train, lambda values: _trains(seen, values))


def _bisected(current: Tensor, train: Tensor, trains: Callable[[Tensor], Tensor]) -> Tensor:
    """Smallest currents found behind every change of the train, infinities at the ends."""
    end = current.new_full((1,), torch.inf)
    differ = train[:, 1:] != train[:, :-1]
    changes = differ.any(0)
    at = changes.nonzero().squeeze(1)
    if not len(at):
        return torch.cat([-end, end])
    low = current[at]
    high = current[at + 1]
    before = train[:, at]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        same = (trains(middle) == before).all(0)
        low = torch.where(same, middle, low)
        high = torch.where(same, high, middle)
    return torch.cat([-end, high, end])


def _trains(seen: _Seen, current: Tensor) -> Tensor:
    """Spikes of every step, [T, M], of neurons with constant currents [M]."""
    functional.reset_net(seen.layer)
    steps = seen.steps
    ndim = seen.inputs[0].ndim
    if seen.layer.step_mode == "m":
        frame = along(current, 0, ndim - 1)
        spikes: Tensor = seen.layer(frame.expand(steps, *frame.shape))
    else:
        frame = along(current, 0, ndim)
        spikes = torch.stack([seen.layer(frame) for _ in range(steps)])
    return spikes.reshape(steps, -1)
