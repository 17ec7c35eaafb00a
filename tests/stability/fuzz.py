"""Looks for an input that leaves the bounds of verify, on random networks; run by hand.

``python tests/stability/fuzz.py --inputs 1000000`` tries so many perturbed inputs: random ones, corners of the ball and
PGD's. It stops at the first verified image that is fooled, with the seed that makes it again.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import nn

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from stability.test_verification import NETWORKS, NEURONS, classifier

from sj_robust.attacks import linf_bounds, pgd
from sj_robust.stability import verify

METHODS = ("ibp", "crown", "bab", "mip")
IMAGES = 4


def main(arguments: list[str] | None = None) -> None:
    """Networks and methods in turn until enough inputs are tried."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="perturbed inputs to try (1000000)")
    parser.add_argument("--points", type=int, default=2000, help="inputs per image (2000)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    options = parser.parse_args(arguments)
    tried = verified = broken = 0
    seed = options.seed
    while tried < options.inputs:
        case = random.Random(seed)
        build, node, method = case.choice(NETWORKS), case.choice(sorted(NEURONS)), case.choice(METHODS)
        eps, mode = 10 ** case.uniform(-3.5, -1), case.choice("ms")
        model = classifier(build, NEURONS[node], seed=seed, step_mode=mode)
        x = torch.rand(IMAGES, 2, 8, 8)
        y = model(x).argmax(1)
        result = verify(model, x, y, eps, method=method, time_limit=1.0)
        held = torch.tensor(result.verified)
        for z in points(model, x, y, eps, options.points // 16):
            fooled = (model(z).argmax(1) != y) & held
            if bool(fooled.any()):
                sys.exit(
                    f"fooled though verified: --seed {seed} ({build.__name__}, {node}, {method}, {mode}, {eps:.3g})"
                )
            tried += IMAGES
        verified, broken, seed = verified + int(held.sum()), broken + sum(result.broken), seed + 1
        print(f"\r{tried} inputs, {verified} images verified, {broken} broken, seed {seed}", end="", flush=True)
    print(f"\r{tried} inputs: none of {verified} verified images was fooled; {broken} were broken by the methods")


def points(model: nn.Module, x: torch.Tensor, y: torch.Tensor, eps: float, count: int):
    """Inputs of the ball, in parts of the batch: eight random ones and seven corners for one of PGD."""
    lower, upper = linf_bounds(x, eps=eps)
    for _ in range(count):
        for _ in range(8):
            yield (lower + (upper - lower) * torch.rand_like(x)).clamp(lower, upper)
        for _ in range(7):
            yield torch.where(torch.rand_like(x) < 0.5, lower, upper)
        yield pgd(model, x, y, eps=eps, step_size=eps / 3, steps=5)


if __name__ == "__main__":
    main()
