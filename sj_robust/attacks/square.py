"""Square Attack: random search over squares, drawn per sample."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sj_robust.attacks.call import (
    Model,
    Randomness,
    averaged,
    checked_copies,
    isolated,
    seeds_of_samples,
    wide,
)
from sj_robust.attacks.logits import clean_logits, margin
from sj_robust.core.checks import check_counts, logits_of
from sj_robust.core.preserved import seeded_network
from sj_robust.core.randomness import SampleDraws, SampleSeeds, draw_seed, rand
from sj_robust.core.threat import Threat, ThreatModel, as_threat, l2_norm, linf_bounds, per_sample

__all__ = ["square"]

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
)
"""Queries after which the area of the square is halved."""
_FIRST_AREA = 0.8  # as a share of the image
_BLOCK = 256  # queries whose numbers are drawn at once
_FIXED_NUMBERS = 5
"""Numbers in [0, 1) that a query draws for two corners and an orientation; one per channel comes
after them, for its sign.
"""
_TILES = 5  # along the shorter side of the first L2 perturbation
_CONFIRMATIONS = 10  # as many times the forwards of a margin decide whether an image is fooled
_RENEWED_EVERY = 10  # queries the margin to beat is measured anew: the lowest of many is too low
_NOTHING = 1e-12  # keeps a length of 0 from being divided by


def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
    queries: int = 5000,
    eot_samples: int = 1,
    generator: Randomness = None,
) -> Tensor:
    """Square Attack: a random search over squares that needs logits but no gradient.

    Square 黑盒攻击。

    Equation: a square of random position and colour is kept if it lowers the margin ``z_y - max_{k
    != y} z_k``, until ``argmax z != y``.

    The search has AutoAttack's settings, and draws the squares per sample, so that neither the
    other samples nor the batch size matter. It needs no other package. Ties between logits are
    broken before an image is judged: spike counts often tie, and a margin of 0 alone is not a
    success.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`, with images [N, C, H,
    W]. Where nothing fooled the network, the result is the image of the smallest margin; images
    that are already misclassified are returned unchanged.

    Where the network draws random numbers, a search that ends at its first lucky forward ends too
    early. With several ``eot_samples``, margins are means over so many forwards, and an image that
    seems to be fooled has to be so in ten times as many fresh ones, or the search goes on from the
    margin found there.

    Args:
        queries: Number of squares tried per image after the start, >= 1.
        eot_samples: Forwards over which logits are averaged, >= 1, for stochastic networks.

    Source: Andriushchenko et al. (ECCV 2020); its settings in AutoAttack, Croce and Hein (ICML
        2020).

    Examples:
        >>> from sj_robust.attacks import square
        >>> model = lambda x: torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)
        >>> x, y = torch.full((1, 1, 4, 4), 0.45), torch.tensor([1])
        >>> model(square(model, x, y, eps=0.2, queries=200)).argmax(1)
        tensor([0])
    """
    ball = as_threat(eps, "Linf", "L2")
    check_counts(queries=queries, eot_samples=eot_samples)
    x, y = checked_copies(model, x, y, generator)
    check_square(x)
    if x.numel() == 0 or ball.eps == 0:
        return x
    with isolated(model, x, generator) as private:
        is_noisy = eot_samples > 1
        sure = averaged(model, _CONFIRMATIONS * eot_samples) if is_noisy else model
        standing = clean_logits(sure, x, y).argmax(1) == y
        x_adv = x.clone()
        if bool(standing.any()):
            seed = draw_seed(private)
            seeds = seeds_of_samples(private, len(x), seed).rows(standing).derived("square", 0)
            with seeded_network(None, seed, x.device):
                found = square_rows(
                    partial(_without_ties, averaged(model, eot_samples), x.dtype),
                    x[standing],
                    y[standing],
                    seeds,
                    ball=ball,
                    queries=queries,
                    sure=partial(_without_ties, sure, x.dtype) if is_noisy else None,
                )
            x_adv[standing] = ball.project(x[standing], found)
    return x_adv


def check_square(x: Tensor) -> None:
    """Square draws its squares in images [N, C, H, W]."""
    if x.ndim != 4:
        raise ValueError(
            f"Square needs images [N, C, H, W], got shape {tuple(x.shape)}; reshape inside the "
            "model, or name attacks without 'square' in `attacks`"
        )


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
    unit = highest.detach().abs() * torch.finfo(logits.dtype).eps
    unit = unit.clamp(min=2.0**-100)
    return logits.scatter(1, winner, highest + unit * tied)


def _without_ties(model: Model, dtype: torch.dtype, images: Tensor) -> Tensor:
    """Logits in float32 whose winner stands alone."""
    y = images.new_zeros(len(images), dtype=torch.int64)
    logits = logits_of(model, images.to(dtype), y)
    return break_ties(logits.float(), logits.argmax(1))


@torch.no_grad()
def square_rows(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    seeds: SampleSeeds,
    *,
    ball: ThreatModel,
    queries: int,
    sure: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Best images [N, C, H, W] of a random search over squares, each inside ball and box.

    ``network`` gives logits without ties. A sample that is fooled takes no part in the queries
    after that; with ``sure``, a sample is fooled if that says so, too.

    Source: Andriushchenko et al. (ECCV 2020), algorithms 1 to 3, with the schedule of AutoAttack. A
    square may lie at the last row and column too, which the published code never reaches.
    """
    squares = _squares(x, ball)
    best = squares.first(SampleDraws(seeds.derived("first")))
    left = margin(network(best), y)
    rows = torch.arange(len(x), device=x.device)
    result = best.clone()
    numbers = x
    for query in range(queries):
        if sure is not None and query % _RENEWED_EVERY == 0:
            left = margin(network(best), y)
        if sure is not None and bool((left <= 0).any()):
            seeming = left <= 0
            left[seeming] = margin(sure(best[seeming]), y[seeming])
        standing = left > 0
        if not bool(standing.all()):
            result[rows] = best
            rows = rows[standing]
            best = best[standing]
            left = left[standing]
            y = y[standing]
            numbers = numbers[standing]
            squares = squares.rows(standing)
        if len(rows) == 0:
            return result
        place = query % _BLOCK
        if place == 0:
            draws = SampleDraws(seeds.rows(rows).derived(query // _BLOCK))
            numbers = _uniform((len(rows), _BLOCK, _FIXED_NUMBERS + x.shape[1]), draws, x)
        area = _FIRST_AREA / 2 ** bisect_left(_HALVINGS, query)
        proposal = squares.propose(best, numbers[:, place], area)
        proposed = margin(network(proposal), y)
        better = proposed < left
        best = torch.where(per_sample(better, best), proposal, best)
        left = torch.where(better, proposed, left)
    result[rows] = best
    return result


def _squares(x: Tensor, ball: ThreatModel) -> "_Linf | _L2":
    if ball.norm == "L2":
        return _L2(x, ball)
    lower, upper = linf_bounds(x, eps=ball.eps)
    return _Linf(lower, upper)


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

    def propose(
        self,
        best: Tensor,
        numbers: Tensor,
        area: float,
    ) -> Tensor:
        """One square of one colour per channel in every image."""
        n, c, h, w = best.shape
        side = max(round(math.sqrt(area * h * w)), 1)
        window = _window(best, numbers[:, :2], min(side, h, w))
        colours = numbers[:, -c:] < 0.5
        up = colours.view(n, c, 1, 1)
        lower = self.lower[window]
        upper = self.upper[window]
        proposal = best.clone()
        proposal[window] = torch.where(up, upper, lower)
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
        down = h // side
        right = w // side
        delta = torch.zeros_like(wide(self.x))
        numbers = _uniform((n, down, right), draws, delta)
        pyramids = _pyramids(side, delta, transposed=numbers < 0.5).unsqueeze(1)
        numbers = _uniform((n, c, down, right), draws, delta)
        signs = _signs(numbers, delta)
        tiles = pyramids * signs[..., None, None]  # [N, C, down, right, side, side]
        height = down * side
        width = right * side
        top = (h - height) // 2
        left = (w - width) // 2
        tiled = tiles.transpose(3, 4).reshape(n, c, height, width)
        delta[:, :, top : top + height, left : left + width] = tiled
        return self._longest(delta)

    def propose(
        self,
        best: Tensor,
        numbers: Tensor,
        area: float,
    ) -> Tensor:
        """One window gets a pyramid on top of what it holds, another one nothing."""
        n, c, h, w = best.shape
        side = max(round(math.sqrt(area * h * w)), 3)
        side = min(side + 1 - side % 2, h, w)
        delta = wide(best) - wide(self.x)
        raised = _window(best, numbers[:, :2], side)
        emptied = _window(best, numbers[:, 2:4], side)
        squared_length = per_sample(l2_norm(delta) ** 2, delta).to(delta.dtype)
        unused = (self.ball.eps**2 - squared_length).clamp(min=0)
        held = delta[raised]
        signs = _signs(numbers[:, -c:], delta)
        signs = signs.view(n, c, 1, 1)
        pyramid = _pyramids(side, delta, transposed=numbers[:, 4] < 0.5)
        pyramid = pyramid.unsqueeze(1) * signs
        pyramid = pyramid + held / (_length(held) + _NOTHING)
        squares = delta.square()
        of_raised = squares[raised].sum((-2, -1), keepdim=True)
        squares[raised] = 0
        of_emptied = squares[emptied].sum((-2, -1), keepdim=True)
        taken_over = of_raised + of_emptied
        delta[emptied] = 0
        length = (unused / c + taken_over).sqrt()
        delta[raised] = pyramid / (_length(pyramid) + _NOTHING) * length
        return self._longest(delta)

    def _longest(self, delta: Tensor) -> Tensor:
        """Image in the direction of ``delta`` at the border of the ball, clamped to the box."""
        length = per_sample(l2_norm(delta), delta).clamp(min=_NOTHING)
        longest = delta * (self.ball.eps / length)
        return self.ball.project(self.x, wide(self.x) + longest)


def _pyramids(side: int, like: Tensor, *, transposed: Tensor) -> Tensor:
    """Two halves of opposite sign, each falling off in nested squares, of length 1; upright or
    transposed.
    """
    height = side // 2
    upper = _pyramid(height, side, like)
    lower = _pyramid(side - height, side, like)
    pyramid = torch.cat([upper, -lower])
    pyramid = pyramid / pyramid.square().sum().sqrt()
    return torch.stack([pyramid, pyramid.T])[transposed.long()]


def _pyramid(height: int, width: int, like: Tensor) -> Tensor:
    """Sum over k of 1/(k+1)^2 in the squares of half width k around the middle, of length 1."""
    count = max(height, width) // 2 + 1
    numbers = torch.arange(1, count + 1, dtype=like.dtype, device=like.device)
    added = 1 / numbers.square()
    heights = added.flip(0).cumsum(0).flip(0)
    rows = _from_middle(height, like)
    columns = _from_middle(width, like)
    pyramid = heights[torch.maximum(rows[:, None], columns)]
    return pyramid / pyramid.square().sum().sqrt()


def _from_middle(size: int, like: Tensor) -> Tensor:
    place = torch.arange(size, device=like.device)
    return (place - size // 2).abs()


def _window(images: Tensor, corner: Tensor, side: int) -> tuple[Tensor, ...]:
    """Index of a square of every image, [N, C, side, side], from two numbers in [0, 1) per image,
    [N, 2].
    """
    n, c, h, w = images.shape
    device = images.device
    sample = torch.arange(n, device=device).view(n, 1, 1, 1)
    channel = torch.arange(c, device=device).view(1, c, 1, 1)
    rows = _span(corner[:, 0], side, h).view(n, 1, side, 1)
    columns = _span(corner[:, 1], side, w).view(n, 1, 1, side)
    return sample, channel, rows, columns


def _span(number: Tensor, side: int, size: int) -> Tensor:
    """``side`` neighbouring places out of ``size``, [N, side]."""
    last = size - side
    first = (number * (last + 1)).long().clamp(max=last)
    return first[:, None] + torch.arange(side, device=number.device)


def _signs(numbers: Tensor, like: Tensor) -> Tensor:
    return torch.where(numbers < 0.5, 1.0, -1.0).to(like.dtype)


def _uniform(shape: tuple[int, ...], draws: SampleDraws, like: Tensor) -> Tensor:
    return rand(shape, draws, dtype=torch.float32, device=like.device)


def _length(values: Tensor) -> Tensor:
    return values.square().sum((-2, -1), keepdim=True).sqrt()
