"""Gradients between spiking layers, where no surrogate has a part, beside finite differences."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.host import is_neuron, step_mode

__all__ = ["IMAGES", "agreement", "agreement_far"]

Forward = Callable[[Tensor], Tensor]

IMAGES = "the images"
_STEPS = (1e-3, 1e-2, 1e-1)
"""Steps whose differences are measured: the first that rounding spares, and larger ones for a
network that rounds its images itself.
"""
_DRAWS = 2
_AWAY = 0.05
"""How far from the images and the spikes slopes are taken, where maxima are not tied."""


def agreement(
    model: object, forward: Forward, x: Tensor, *, seed: int, with_images: bool
) -> dict[str, float]:
    """How well the gradient predicts what a small step does, by the name of what moves: the images,
    and the outputs of every spiking layer.

    Equation, with a step ``d v`` of what moves, the inputs ``i`` of the spiking layers that it
    reaches without passing another one (or the logits), random weights ``u`` of these, and sums
    over images and draws::

        cosine(<grad <u, i>, v>, <u, i(d v) - i(0)> / d)

    The best over a few ``d`` counts; it is 1 for an honest gradient of any length. What spiking
    layers put out is held, so that none of their surrogates has a part.

    Args:
        model: The network.
        forward: Its logits [N, classes], with equal random numbers in every call.
        x: Images [N, ...].
        seed: Of the directions.
        with_images: Whether the images are moved.
    """
    held = _Held(len(x), seed)
    with held.inside(model):
        held.begin(forward, x)
        names = [name for name in held.leaves if with_images or name != IMAGES]
        return {name: max(held.agreement(forward, name, _STEPS)) for name in names}


def agreement_far(model: object, forward: Forward, x: Tensor, *, seed: int, step: float) -> float:
    """How well the gradient at the images predicts what one larger step does to the inputs of the
    spiking layers that they reach first; 1 for a network without spiking layers, which may bend.

    Args:
        model: The network.
        forward: Its logits, as in :func:`agreement`.
        x: Images [N, ...].
        seed: Of the directions.
        step: Of every pixel.
    """
    held = _Held(len(x), seed)
    with held.inside(model):
        held.begin(forward, x)
        if held.leaves.keys() == {IMAGES}:
            return 1.0
        (found,) = held.agreement(forward, IMAGES, (step,))
        return found


class _Held:
    """A network whose spiking layers put out what they did in the first forward, beside it, or
    moved from there.
    """

    def __init__(self, images: int, seed: int) -> None:
        self.leaves: dict[str, list[_Values]] = {}
        self._images = images
        self._generator = torch.Generator().manual_seed(seed)
        self._calls: Counter[str] = Counter()
        self._inputs: list[_Values] = []
        self._moved: dict[str, list[Tensor]] = {}

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers in [0, 1]."""
        return torch.rand(like.shape, generator=self._generator).to(like)

    @contextmanager
    def inside(self, model: object) -> Iterator[None]:
        """Hooks on every spiking layer."""
        handles = []
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        for name, module in modules:
            if is_neuron(module):
                dim = 1 if step_mode(module) == "m" else 0
                before, after = partial(self._begins, dim), partial(self._ends, dim, name)
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def begin(self, forward: Forward, x: Tensor) -> None:
        """Find what every spiking layer puts out, near the images and within [0, 1]."""
        self.run(forward, torch.where(x < 0.5, x, x - _AWAY))

    def run(self, forward: Forward, x: Tensor | None = None) -> list["_Values"]:
        """What the leaves move, in the order of a forward."""
        self._calls.clear()
        self._inputs = []
        logits = forward(self._output(IMAGES, 0, x))
        return [*self._inputs, _Values(logits, 0)]

    def agreement(self, forward: Forward, name: str, steps: Sequence[float]) -> list[float]:
        """The cosine of every step; 0 where a network does something else then."""
        leaves = self.leaves[name]
        with torch.enable_grad():
            base = self.run(forward)
        by_image = all(one.fits(self._images) for one in (*leaves, *base))
        predicted: list[Tensor] = []
        measured: dict[float, list[Tensor]] = {step: [] for step in steps}
        for _ in range(_DRAWS):
            ways = [(self.uniform(leaf.tensor) - 0.5).sign() for leaf in leaves]
            weights = [self.uniform(target.tensor) - 0.5 for target in base]
            slopes = _slopes(base, weights, leaves)
            products = [
                leaf.times(g, way) for leaf, g, way in zip(leaves, slopes, ways, strict=True)
            ]
            predicted.append(_total(products, by_image))
            for step in steps:
                self._moved = {name: [step * way for way in ways]}
                with torch.no_grad():
                    after = self.run(forward)
                self._moved = {}
                if _shapes(after) != _shapes(base):  # as with other time steps
                    return [0.0] * len(steps)
                changes = [
                    one.times(one.tensor - before.tensor.detach(), weight / step)
                    for one, before, weight in zip(after, base, weights, strict=True)
                ]
                measured[step].append(_total(changes, by_image))
        claimed = torch.cat(predicted)
        return [_cosine(claimed, torch.cat(found)) for found in measured.values()]

    def _output(self, name: str, dim: int, given: Tensor | None) -> Tensor:
        """What a layer puts out in its next call."""
        known, number = self.leaves.setdefault(name, []), self._calls[name]
        self._calls[name] += 1
        if number == len(known):
            assert given is not None  # of the first forward
            leaf = given.detach() + _AWAY * self.uniform(given)
            known.append(_Values(leaf.requires_grad_(), dim))
        found = known[number].tensor
        return found + self._moved[name][number] if name in self._moved else found

    def _begins(self, dim: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            self._inputs.append(_Values(arguments[0], dim))

    def _ends(self, dim: int, name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        return self._output(name, dim, output) if isinstance(output, Tensor) else output


@dataclass(frozen=True)
class _Values:
    """A tensor and the dimension of its images."""

    tensor: Tensor
    dim: int

    def fits(self, images: int) -> bool:
        """Whether this dimension is of the images."""
        return self.tensor.shape[self.dim : self.dim + 1] == (images,)

    def times(self, one: Tensor, other: Tensor) -> "_Values":
        """A product of its shape."""
        return _Values(one.double() * other.double(), self.dim)


def _shapes(values: list[_Values]) -> list[torch.Size]:
    return [one.tensor.shape for one in values]


def _slopes(base: list[_Values], weights: list[Tensor], leaves: list[_Values]) -> list[Tensor]:
    """The gradient of the weighted values at the leaves, zero where there is none."""
    moved = [leaf.tensor for leaf in leaves]
    pairs = zip(base, weights, strict=True)
    connected = [(one.tensor * weight).sum() for one, weight in pairs if one.tensor.requires_grad]
    if not connected:
        return list(map(torch.zeros_like, moved))
    return list(
        torch.autograd.grad(
            torch.stack(connected).sum(),
            moved,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _total(values: list[_Values], by_image: bool) -> Tensor:
    """The sum of every image, [N]; over all of them, [1], where it is not known which is whose."""
    if not by_image:
        return torch.stack([one.tensor.sum() for one in values]).sum()[None]
    of_images = [one.tensor.movedim(one.dim, 0).flatten(1).sum(1) for one in values]
    return torch.stack(of_images).sum(0)


def _cosine(one: Tensor, other: Tensor) -> float:
    """Of two vectors, of which two of zeros agree."""
    one, other = one.detach(), other.detach()
    lengths = one.norm() * other.norm()
    if float(lengths) == 0:
        return float(one.norm() == other.norm())
    return float((one @ other) / lengths)
