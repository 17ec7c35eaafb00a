"""Slopes that depend on several steps: the spread of PDSG and the memory of ASSG."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sj_robust.estimators.shapes import SHAPES, SHARPNESS

__all__ = ["ImageTracker", "Rotation", "Sharpness", "Spread"]

_Choice = TypeVar("_Choice")
_MEMORY = 0.9  # of both moving averages of ASSG
_SPREAD_WEIGHT = 1.5
_OFFSET = 1e-4
_SMALLEST_SPREAD = 1e-30  # what is less has no finite reciprocal in float32, and stands for 0


class Rotation:
    """Which of several things is taken, another one in every forward that has a gradient."""

    def __init__(self) -> None:
        """Begin with the first of them."""
        self._forwards = 0

    def turn(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Go on to the next; a hook in front of the network's forward."""
        if torch.is_grad_enabled():
            self._forwards += 1

    def of(self, choices: Sequence[_Choice]) -> _Choice:
        """The one of this forward."""
        return choices[(self._forwards - 1) % len(choices)]


class Spread:
    """PDSG of one neuron: normal density with mean sigma / 2 and standard deviation sigma.

    Equation: ``g(z[t]) = exp(-((z[t] - sigma[t] / 2) / sigma[t])**2 / 2) / (sqrt(2 pi) *
    sigma[t])`` with ``sigma[t]`` the standard deviation of ``h[0..t]`` over steps, batch and space,
    one per channel (1 where it is 0); a layer without space, [N, F], has a single sigma.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._count = 0
        self._mean = torch.zeros(())
        self._squares = torch.zeros(())

    def __call__(self, z_seq: Tensor, first: int) -> Tensor:
        """Slopes at ``z_seq`` [T, N, *], of which the first is step ``first`` of the sequence."""
        mean, squares, here = _moments(z_seq)
        if first == 0:
            self._count = 0
        sigmas = []
        for step_mean, step_squares in zip(mean.unbind(0), squares.unbind(0), strict=True):
            total = self._count + here
            if self._count == 0:
                self._mean = step_mean
                self._squares = step_squares
            else:
                distance = step_mean - self._mean
                between = distance.square() * (self._count * here / total)
                self._squares = self._squares + step_squares + between
                self._mean = self._mean + distance * (here / total)
            self._count = total
            variance = self._squares / max(total - 1, 1)
            sigmas.append(variance.sqrt())
        sigma = torch.stack(sigmas)
        sigma = torch.where(sigma > _SMALLEST_SPREAD, sigma, 1.0)
        return SHAPES["gaussian"](z_seq - sigma / 2, 1 / sigma)


def _moments(z_seq: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and summed squared deviations over batch and space, [T, 1, C, 1, ..], and the number of
    values in each.

    Relative to the first value of each, so that values that are all alike have a deviation of
    exactly 0.
    """
    shape = [1] * z_seq.ndim
    shape[0] = len(z_seq)
    if z_seq.ndim > 3:
        shape[2] = z_seq.shape[2]
        flat = z_seq.flatten(3)
    else:
        flat = z_seq.reshape(len(z_seq), 1, 1, -1)
    near = flat[:, :1, :, :1]
    deviation = flat - near
    mean = deviation.mean(3, keepdim=True).mean(1, keepdim=True)
    squared = (deviation - mean).square_()
    squares = squared.sum(3, keepdim=True).sum(1, keepdim=True)
    count = flat.shape[1] * flat.shape[3]
    return (mean + near).view(shape), squares.view(shape), count


class _Memory(NamedTuple):
    """M and D of :class:`Sharpness`, each [T, N, *]."""

    mean: Tensor
    spread: Tensor


class Sharpness:
    """ASSG of one neuron: a shape, ``share`` of its area kept, whose sharpness follows |z| over an
    attack's iterations.

    Equation, per neuron, time step and sample, M = 1 and D = 0 before the first forward of a
    batch::

        M <- 0.9 M + 0.1 |z|
        D <- 0.9 D + 0.1 ||z| - M|          with the new M
        alpha = omega / (M + 1.5 D + 1e-4)

    ``omega`` is the sharpness at which the share of the shape's area lies within |z| <= 1.

    Forwards of the same images (of one EoT average) all start from what the images before them
    left.
    """

    def __init__(self, images: "ImageTracker", shape: str, share: float) -> None:
        """Nothing seen yet."""
        self._images = images
        self._shape = SHAPES[shape]
        self._omega = SHARPNESS[shape](share)
        self._turn = 0
        # By first step of a call.
        self._before: dict[int, _Memory] = {}
        self._after: dict[int, _Memory] = {}

    def __call__(self, z_seq: Tensor, first: int) -> Tensor:
        """Slopes at ``z_seq`` [T, N, *], of which the first is step ``first`` of the sequence."""
        if first == 0 and self._turn != self._images.turn:
            self._before = {}
            for step, memory in self._after.items():
                self._before[step] = self._images.follow(memory)
            self._after = {}
            self._turn = self._images.turn
        size = z_seq.abs()
        before = self._before.get(first)
        if before is not None and before.mean.shape != size.shape:
            before = None
        last_mean = torch.ones_like(size) if before is None else before.mean
        mean = last_mean.lerp(size, 1 - _MEMORY)
        deviation = torch.sub(mean, size, out=size).abs_()
        if before is None:
            spread = deviation.mul_(1 - _MEMORY)
        else:
            spread = before.spread.lerp(deviation, 1 - _MEMORY)
        if self._images.counts:
            self._after[first] = _Memory(mean, spread)
        width = torch.add(mean, spread, alpha=_SPREAD_WEIGHT).add_(_OFFSET)
        alpha = width.reciprocal_().mul_(self._omega)
        return self._shape(z_seq, alpha)


class ImageTracker:
    """Observes the inputs of a network, and distinguishes a new iteration of an attack from another
    forward of the same one.

    A batch that got smaller holds some of the samples of the one before: each image takes over the
    state of the image nearest to it (an attack moves an image less than images differ). Any other
    change of shape starts again.

    Attributes:
        turn: Number of different images so far.
        counts: Whether the present forward is one whose images want a gradient.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.turn = 0
        self.counts = False
        self._last: Tensor | None = None
        self._identity: tuple[Any, int] = (lambda: None, -1)
        self._rows: Tensor | None = None
        self._samples = -1
        self._related = False

    def see(self, module: Any, arguments: tuple[Any, ...]) -> None:
        """Forward pre-hook of the network."""
        images = next((value for value in arguments if isinstance(value, Tensor)), None)
        self.counts = False
        if images is None or not images.requires_grad or not torch.is_grad_enabled():
            return
        self.counts = True
        reference, version = self._identity
        if reference() is images and images._version == version:
            return
        self.turn += 1
        self._compare(images.detach())
        self._identity = (weakref.ref(images), images._version)

    def follow(self, memory: _Memory) -> _Memory:
        """Memory of the previous images for the present ones; of another shape where they have
        none.
        """
        mean, spread = memory
        if not self._related:
            return _Memory(mean[:0], spread[:0])
        if self._rows is None or mean.shape[1] != self._samples:
            return memory
        return _Memory(mean[:, self._rows], spread[:, self._rows])

    def __reduce__(self) -> tuple[type["ImageTracker"], tuple[()]]:
        """A copy of a network has its own, which has seen nothing."""
        return ImageTracker, ()

    def _compare(self, images: Tensor) -> None:
        last = self._last
        self._last = images
        self._rows = None
        self._related = False
        if last is None or last.shape[1:] != images.shape[1:] or len(images) > len(last):
            return
        self._related = True
        if len(images) < len(last):
            self._samples = len(last)
            distance = torch.cdist(images.flatten(1), last.flatten(1), p=float("inf"))
            self._rows = distance.argmin(1)
