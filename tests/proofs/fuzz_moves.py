"""Looks for moves in time that leave the bounds of verify, on random networks; run by hand.

``python -m proofs.fuzz_moves --inputs 1000000``, in tests/, tries so many sets of moves, of binary
frames and of numbers of events: random ones, those that keep events on one line close together, and
the largest by the gradient of a logit or a spike. It stops at the first spike, sum over time of
spikes, potential, logit or margin outside its bounds, with the seed that makes the network again.
"""

import random
from collections import Counter
from collections.abc import Iterable

import torch
from proofs import fuzz, fuzz_flips
from torch import Tensor

from sj_robust.classifier import SpikingEventClassifier
from sj_robust.proofs.moves import MovedEvents

METHODS = ["joint"] * 12 + ["ibp"] * 4
STEPS = (4, 3, 2, 6, 4, 11)


def check(seed: int, points: int) -> Counter:
    """Try so many sets of moves on a random network; AssertionError says what left its bounds."""
    case = random.Random(seed)
    torch.manual_seed(seed)
    grid = case.random() < 0.4
    T = STEPS[seed % len(STEPS)]
    if case.random() < 0.5:
        net = fuzz_flips.fully_connected(case, grid, T)
    else:
        net = fuzz.random_classifier(case, grid, T).net
    model = SpikingEventClassifier(net, T).eval()
    x = (torch.rand(fuzz.IMAGES, T, 2, 6, 6) < case.choice([0.1, 0.3, 0.5, 0.8])).float()
    counts = case.random() < 0.3
    if counts:
        x = x * torch.randint(1, 4, x.shape)
    shift = case.choice([None, 1, 1, 2])
    if shift is not None:
        shift = min(shift, T - 1)
    ball = MovedEvents.of(x, case.choice([1, 1, 2, 3, 5, 10]), shift, counts=counts)
    method = case.choice(METHODS)
    y = model(x).argmax(1)
    given = {"norm": "moves", "largest_shift": shift, "counts": counts}
    proved = fuzz.Proved.of(model, x, y, ball.budget, method, **given)
    several = x.repeat_interleave(max(1, points // (3 * fuzz.IMAGES)), 0)
    return fuzz_flips.tried(
        model,
        proved,
        case,
        several,
        y,
        perturbed=lambda scores: moved(several, scores, ball),
        slope=lambda gradient: gradient,
    )


def check_all(seeds: Iterable[int], points: int) -> None:
    """Several networks."""
    for seed in seeds:
        check(seed, points)


def moved(frames: Tensor, scores: Tensor, ball: MovedEvents) -> Tensor:
    """Frames with the moves that raise the scores most, as many as may, or fewer; several of a
    pixel and polarity by turns, so that events make way for others.
    """
    z = frames
    still = torch.ones_like(frames)  # events that have not moved yet
    left = torch.full((len(frames),), int(ball.budget))
    order = scores.detach() + 1e-3 * torch.rand_like(scores)
    for _ in range(int(ball.budget)):
        z, still, left = one_move_a_line(z, still, left, order, ball, frames)
        if not bool((left > 0).any()):
            break
    return z.detach().clone()


def one_move_a_line(
    z: Tensor, still: Tensor, left: Tensor, order: Tensor, ball: MovedEvents, frames: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The best move of each pixel and polarity, of events of the clean frames that are where they
    were, as far as the budget goes.
    """
    T = z.shape[1]
    flat, score = z.flatten(2), order.flatten(2)
    unmoved = still.flatten(2) > 0
    best = torch.full_like(flat[:, 0], -torch.inf)
    ends = torch.zeros(2, *best.shape, dtype=torch.int64)
    for t in range(T):
        for to in range(max(0, t - ball.largest_shift), min(T, t + ball.largest_shift + 1)):
            room = (flat[:, to] == 0) | ball.counts
            possible = (flat[:, t] > 0) & unmoved[:, t] & room & torch.tensor(t != to)
            gain = torch.where(possible, score[:, to] - score[:, t], -torch.inf)
            better = gain > best
            best = torch.where(better, gain, best)
            ends[0] = torch.where(better, t, ends[0])
            ends[1] = torch.where(better, to, ends[1])
    rank = best.argsort(1, descending=True).argsort(1)
    chosen = (rank < left[:, None]) & (best > -torch.inf)
    if bool((best[chosen] > 0).any()):  # without a gain a draw decides
        chosen &= (best > 0) | (torch.rand_like(best) < 0.1)
    change = chosen.to(flat.dtype).unsqueeze(1)
    after = flat.scatter_add(1, ends[:1].transpose(0, 1), -change)
    after = after.scatter_add(1, ends[1:].transpose(0, 1), change)
    # neither end is moved again: which of several events it is, nobody knows
    touched = torch.zeros_like(flat).scatter_add(1, ends[:1].transpose(0, 1), change)
    touched = touched.scatter_add(1, ends[1:].transpose(0, 1), change)
    keeps = still.flatten(2) * (touched == 0)
    return after.view_as(z), keeps.view_as(still), left - chosen.sum(1)


if __name__ == "__main__":
    fuzz.main(check, __doc__)
