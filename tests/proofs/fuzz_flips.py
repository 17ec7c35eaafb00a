"""Looks for changed events that leave the bounds of verify for L0, on random networks; run by hand.

``python -m proofs.fuzz_flips --inputs 1000000``, in tests/, tries so many sets of changes, of
binary frames and of numbers of events: random ones, those of one place of the frames, and the
largest by the gradient of a logit or a spike. It stops at the first spike, sum over time of spikes,
potential, logit or margin outside its bounds, with the seed that makes the network again.
"""

import random
from collections import Counter
from collections.abc import Callable

import torch
from proofs import fuzz
from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

from sj_robust.classifier import SpikingEventClassifier
from sj_robust.proofs.changes import Flips

METHODS = ["joint"] * 12 + ["ibp"] * 4


def check(seed: int, points: int) -> Counter:
    """Try so many sets of changes on a random network; AssertionError says what left its bounds."""
    case = random.Random(seed)
    torch.manual_seed(seed)
    grid = case.random() < 0.4
    T = fuzz.STEPS[seed % len(fuzz.STEPS)]
    if case.random() < 0.3:
        net = fully_connected(case, grid, T)
    else:
        net = fuzz.random_classifier(case, grid, T).net
    model = SpikingEventClassifier(net, T).eval()
    drawn = torch.rand(fuzz.IMAGES, T, 2, 6, 6)
    share = case.choice([0.1, 0.3, 0.5])
    x = (drawn < share).float()
    budget = case.choice([1, 1, 2, 3, 5, 10])
    counts = case.random() < 0.4
    if counts:
        x = x * torch.randint(1, 5, x.shape)
    ball = Flips(budget, counts)
    method = case.choice(METHODS)
    y = model(x).argmax(1)
    proved = fuzz.Proved.of(model, x, y, budget, method, norm="L0", counts=counts)
    several = x.repeat_interleave(max(1, points // (3 * fuzz.IMAGES)), 0)
    return tried(
        model,
        proved,
        case,
        several,
        y,
        perturbed=lambda scores: changed(several, scores, ball),
        slope=lambda gradient: gradient if counts else gradient * (1 - 2 * several),
    )


def tried(
    model: SpikingEventClassifier,
    proved: fuzz.Proved,
    case: random.Random,
    several: Tensor,
    y: Tensor,
    *,
    perturbed: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
) -> Counter:
    """Perturb frames at random, by the gradient of a logit or a spike, and at one place, and
    compare each run with the bounds.

    ``perturbed`` makes frames out of a score of each value, ``slope`` a score out of a gradient.
    """
    total = Counter(inputs=0, networks=1, spikes=0)
    total["verified"] = int((proved.margin > 0).sum())
    total["one budget"] = int(not proved.run.apart)
    scores = torch.rand_like(several)
    for way in ("random", "uphill", "one place"):
        z = perturbed(scores)
        climbs = way == "random"
        with fuzz.float32_products(model, climbs=climbs, onednn=True):
            seen, found = fuzz.run_of(model, z.requires_grad_(climbs))
        proved.assert_logits(found, y)
        total["spikes"] += proved.assert_layers(seen, case)
        total["inputs"] += len(z)
        if climbs:
            outputs = [found, *(spikes.movedim(0, 1) for spikes, _ in seen.values())]
            uphill = slope(fuzz.signed_gradient(case, z, outputs))
            scores = uphill + 0.9 * torch.rand_like(uphill)
        else:
            scores = near_a_place(several)
    return total


def fully_connected(case: random.Random, grid: bool, T: int) -> nn.Sequential:
    """Two linear layers of spiking neurons."""
    width = case.choice([3, 8])
    biased = case.random() < 0.7
    net = nn.Sequential(
        layer.Flatten(),
        layer.Linear(72, width, bias=biased),
        fuzz.random_node(case, grid, T),
        layer.Linear(width, 4),
        fuzz.random_node(case, grid, T),
        layer.Linear(4, 3),
    )
    for value in net.parameters():
        value.data *= 2
        if grid:
            value.data = value.data.mul(10).round() / 10
    functional.set_step_mode(net, case.choice("ms"))
    return net


def changed(frames: torch.Tensor, scores: torch.Tensor, ball: Flips) -> torch.Tensor:
    """Frames with the values changed that have the highest scores, as many as may, or fewer; of
    numbers of events those that a sum with the scores, each with a sign, gains most by, and in half
    of the samples one change of a value at most.
    """
    if ball.counts:
        return counts_changed(frames, scores.detach(), ball)
    costs = scores.detach() * (2 * frames - 1)
    z = ball.lowest(frames, costs)
    return z.detach().clone()


def counts_changed(frames: torch.Tensor, scores: torch.Tensor, ball: Flips) -> torch.Tensor:
    """See :func:`changed`."""
    if bool((scores >= 0).all()):  # no gradient, which has a direction
        scores = scores * (torch.randint(2, scores.shape) * 2 - 1)
    z = ball.lowest(frames, -scores)
    spread = frames + (z - frames).sign()
    rest = Flips(1, counts=True)
    for _ in range(int(ball.budget)):
        left = (spread - frames).abs().flatten(1).sum(1) < ball.budget
        untouched = scores * (spread == frames) * left.view(-1, *[1] * (frames.ndim - 1))
        spread = rest.lowest(spread, -untouched)
    alternate = torch.arange(len(frames)) % 2 == 0
    return torch.where(alternate.view(-1, *[1] * (frames.ndim - 1)), z, spread).detach().clone()


def near_a_place(frames: torch.Tensor) -> torch.Tensor:
    """Scores that are highest around a random place, in all time steps and polarities."""
    side = frames.shape[-1]
    places = torch.randint(side, (len(frames), 2, 1, 1))
    line = torch.arange(side)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))
    distance = (grid - places).abs().sum(1)
    near = 1.0 / (1.0 + distance)
    return near[:, None, None] * (0.5 + torch.rand_like(frames))


if __name__ == "__main__":
    fuzz.main(check, __doc__)
