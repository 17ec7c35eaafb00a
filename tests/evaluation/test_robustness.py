from functools import partial

import pytest
import torch
from torch import nn

from sj_robust.attacks import fgsm
from sj_robust.evaluation import Score, ThreatModel, accuracy, environment, evaluate_attacks

THREAT = ThreatModel("Linf", 0.2)


class Brightness(nn.Module):
    """Class 1 if the one pixel is above 1/2."""

    scale = 1.0

    def forward(self, x):
        value = self.scale * x.flatten(1)
        return torch.cat((0.5 - value, value - 0.5), 1)


def batches():
    x = torch.tensor([0.1, 0.4, 0.6, 0.65, 0.9, 0.95, 0.2]).view(-1, 1, 1, 1)
    y = torch.tensor([0, 0, 1, 1, 1, 0, 0])  # the last but one is wrong
    return [(x[:4], y[:4]), (x[4:], y[4:])]


def test_scores_are_counts_over_all_batches():
    seen = []
    attacks = {"fgsm": partial(fgsm, eps=0.2)}
    report = evaluate_attacks(
        Brightness(), batches(), attacks, threat=THREAT, network="n", on_batch=lambda: seen.append(1)
    )
    # Within 0.2 of the border lie 0.4, 0.6 and 0.65.
    assert report.scores == (Score("n", "clean", 6, 7), Score("n", "fgsm", 3, 7))
    assert len(seen) == 2
    assert accuracy(Brightness(), batches(), attacks) == {"clean": 6 / 7, "fgsm": 3 / 7}


def test_every_batch_gets_its_own_noise_and_the_seed_decides_it():
    seen = []

    def attack(model, x, y, *, generator):
        seen.append(torch.rand(3, generator=generator).tolist())
        return x

    for seed in (0, 0, 1):
        evaluate_attacks(Brightness(), batches(), {"a": attack}, threat=THREAT, seed=seed)
    assert seen[0] != seen[1]
    assert seen[:2] == seen[2:4]
    assert seen[0] != seen[4]


def test_wrong_use():
    with pytest.raises(ValueError, match="'clean' is taken"):
        evaluate_attacks(Brightness(), batches(), {"clean": partial(fgsm, eps=0.1)}, threat=THREAT)
    broken = Brightness()
    broken.scale = float("nan")
    with pytest.raises(ValueError, match="logits must be finite"):
        evaluate_attacks(broken, batches(), {}, threat=THREAT)


def test_environment_names_what_a_result_depends_on():
    found = environment()
    assert {"python", "torch", "sj_robust", "accelerate", "device", "commit", "threads"} <= found.keys()
