"""Square Attack whose draws are per sample, so that neighbours and batch size do not matter."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sj_robust.attacks.logits import margin
from sj_robust.attacks.projection import l2_norm, linf_bounds, per_sample
from sj_robust.attacks.threat import ThreatModel
from sj_robust.core.randomness import SampleDraws, SampleSeeds, rand

_HALVINGS = (
    10,
    50,
    200,
    500,
    1000,
    2000,
    4000,
    6000,
    8000,
)  # queries after which the area of the square is halved
_FIRST_AREA = 0.8  # as a share of the image
_BLOCK = 256  # queries whose numbers are drawn at once
_TILES = 5  # along the shorter side of the first L2 perturbation


def break_ties(logits: Tensor, winner: Tensor) -> Tensor:
    """Logits whose winner stands alone: raised by one unit in the last place where another one
    equals it.

    Spike counts tie exactly, and an attack that looks at margins takes a margin of 0 for success
    while ``argmax`` may still pick the label. The winner [N], ``argmax`` before any rounding, stays
    the winner; gradients and all other logits stay as they are, in a tensor of its own.
    """
    first, second = logits.topk(2).values.unbind(1)
    tied = (first == second).unsqueeze(1)
    if not bool(tied.any()):
        return logits.clone()
    winner = winner.unsqueeze(1)
    highest = logits.gather(1, winner)
    unit = (highest.detach().abs() * torch.finfo(logits.dtype).eps).clamp(min=2.0**-100)
    return logits.scatter(1, winner, highest + unit * tied)


@torch.no_grad()
def square_rows(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    seeds: SampleSeeds,
    *,
    ball: ThreatModel,
    queries: int,
) -> Tensor:
    """Best images [N, C, H, W] of a random search over squares, each inside ball and box.

    ``network`` gives logits without ties. A sample that is fooled takes no part in the queries
    after that.

    Source: Andriushchenko et al. (ECCV 2020), algorithms 1 to 3, with the schedule of AutoAttack. A
    square may lie at the last row and column too, which the published code never reaches.
    """
    squares = _Linf(*linf_bounds(x, eps=ball.eps)) if ball.norm == "Linf" else _L2(x, ball)
    best = squares.first(SampleDraws(seeds.derived("first")))
    left, rows, result = (
        margin(network(best), y),
        torch.arange(len(x), device=x.device),
        best.clone(),
    )
    numbers = x
    for query in range(queries):
        standing = left > 0
        if not bool(standing.all()):
            result[rows] = best
            rows, best, left, y, numbers = (
                value[standing] for value in (rows, best, left, y, numbers)
            )
            squares = squares.rows(standing)
        if len(rows) == 0:
            return result
        if query % _BLOCK == 0:
            draws = SampleDraws(seeds.rows(rows).derived(query // _BLOCK))
            # Of each query two corners, an orientation, a sign per channel.
            numbers = _uniform((len(rows), _BLOCK, 5 + x.shape[1]), draws, x)
        proposal = squares.propose(
            best, numbers[:, query % _BLOCK], _FIRST_AREA / 2 ** bisect_left(_HALVINGS, query)
        )
        proposed = margin(network(proposal), y)
        better = proposed < left
        best = torch.where(per_sample(better, best), proposal, best)
        left = torch.where(better, proposed, left)
    result[rows] = best
    return result


@dataclass(frozen=True)
class _Linf:
    """Squares of the highest or lowest values that box and Linf ball allow."""

    lower: Tensor
    upper: Tensor

    def rows(self, rows: Tensor) -> "_Linf":
        """Those of a selection of the samples."""
        return _Linf(self.lower[rows], self.upper[rows])

    def first(self, draws: SampleDraws) -> Tensor:
        """Vertical stripes."""
        n, c, _, w = self.lower.shape
        up = _uniform((n, c, 1, w), draws, self.lower) < 0.5
        return torch.where(up, self.upper, self.lower)

    def propose(self, best: Tensor, numbers: Tensor, area: float) -> Tensor:
        """One square of one colour per channel in every image."""
        n, c, h, w = best.shape
        side = min(max(round(math.sqrt(area * h * w)), 1), h, w)
        window = _window(best, numbers[:, 0], numbers[:, 1], side)
        up = (numbers[:, -c:] < 0.5).view(n, c, 1, 1)
        proposal = best.clone()
        proposal[window] = torch.where(up, self.upper[window], self.lower[window])
        return proposal


@dataclass(frozen=True)
class _L2:
    """Pyramids that take over the length of the perturbation in two windows and what is left of the
    radius.
    """

    x: Tensor
    ball: ThreatModel

    def rows(self, rows: Tensor) -> "_L2":
        """Those of a selection of the samples."""
        return _L2(self.x[rows], self.ball)

    def first(self, draws: SampleDraws) -> Tensor:
        """Tiles of pyramids of random sign and orientation."""
        n, c, h, w = self.x.shape
        side = max(min(h, w) // _TILES, 1)
        down, right = h // side, w // side
        delta = torch.zeros_like(_wide(self.x))
        pyramids = _pyramids(side, delta)[(_uniform((n, down, right), draws, delta) < 0.5).long()]
        signs = torch.where(_uniform((n, c, down, right), draws, delta) < 0.5, 1.0, -1.0).to(
            delta.dtype
        )
        tiles = pyramids.unsqueeze(1) * signs[..., None, None]  # [N, C, down, right, side, side]
        top, left = (h - down * side) // 2, (w - right * side) // 2
        delta[:, :, top : top + down * side, left : left + right * side] = tiles.transpose(
            3, 4
        ).reshape(n, c, down * side, right * side)
        return self._longest(delta)

    def propose(self, best: Tensor, numbers: Tensor, area: float) -> Tensor:
        """One window gets a pyramid on top of what it holds, another one nothing."""
        n, c, h, w = best.shape
        side = max(round(math.sqrt(area * h * w)), 3)
        side = min(side + 1 - side % 2, h, w)
        delta = _wide(best) - _wide(self.x)
        raised = _window(best, numbers[:, 0], numbers[:, 1], side)
        emptied = _window(best, numbers[:, 2], numbers[:, 3], side)
        unused = (self.ball.eps**2 - per_sample(l2_norm(delta) ** 2, delta).to(delta.dtype)).clamp(
            min=0
        )
        held = delta[raised]
        signs = torch.where(numbers[:, -c:] < 0.5, 1.0, -1.0).to(delta.dtype).view(n, c, 1, 1)
        pyramid = _pyramids(side, delta)[(numbers[:, 4] < 0.5).long()].unsqueeze(1) * signs
        pyramid = pyramid + held / (_length(held) + 1e-12)
        squares = delta.square()
        square = squares[raised].sum((-2, -1), keepdim=True)
        squares[raised] = 0
        square = square + squares[emptied].sum((-2, -1), keepdim=True)
        delta[emptied] = 0
        delta[raised] = pyramid / (_length(pyramid) + 1e-12) * (unused / c + square).sqrt()
        return self._longest(delta)

    def _longest(self, delta: Tensor) -> Tensor:
        """Image in the direction of ``delta`` at the border of the ball, clamped to the box."""
        length = per_sample(l2_norm(delta), delta).clamp(min=1e-12)
        return self.ball.project(self.x, _wide(self.x) + delta * (self.ball.eps / length))


def _pyramids(side: int, like: Tensor) -> Tensor:
    """Two halves of opposite sign, each falling off in nested squares, of length 1; upright and
    transposed.
    """
    upper, lower = (_pyramid(height, side, like) for height in (side // 2, side - side // 2))
    pyramid = torch.cat([upper, -lower])
    pyramid = pyramid / pyramid.square().sum().sqrt()
    return torch.stack([pyramid, pyramid.T])


def _pyramid(height: int, width: int, like: Tensor) -> Tensor:
    """Sum over k of 1/(k+1)^2 in the squares of half width k around the middle, of length 1."""
    steps = (
        1
        / torch.arange(
            1, max(height, width) // 2 + 2, dtype=like.dtype, device=like.device
        ).square()
    )
    heights = steps.flip(0).cumsum(0).flip(0)
    rows, columns = ((torch.arange(n, device=like.device) - n // 2).abs() for n in (height, width))
    pyramid = heights[torch.maximum(rows[:, None], columns)]
    return pyramid / pyramid.square().sum().sqrt()


def _window(images: Tensor, down: Tensor, right: Tensor, side: int) -> tuple[Tensor, ...]:
    """Index of a square of every image, [N, C, side, side], from two numbers in [0, 1) per
    image.
    """
    n, c, h, w = images.shape
    span = torch.arange(side, device=images.device)
    top, left = (
        (number * (size - side + 1)).long().clamp(max=size - side)
        for number, size in ((down, h), (right, w))
    )
    return (
        torch.arange(n, device=images.device).view(n, 1, 1, 1),
        torch.arange(c, device=images.device).view(1, c, 1, 1),
        (top[:, None] + span).view(n, 1, side, 1),
        (left[:, None] + span).view(n, 1, 1, side),
    )


def _uniform(shape: tuple[int, ...], draws: SampleDraws, like: Tensor) -> Tensor:
    return rand(shape, draws, dtype=torch.float32, device=like.device)


def _wide(images: Tensor) -> Tensor:
    """Images in a dtype that a search can compute in."""
    return images if images.dtype == torch.float64 else images.float()


def _length(values: Tensor) -> Tensor:
    return values.square().sum((-2, -1), keepdim=True).sqrt()
