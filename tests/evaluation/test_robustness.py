from functools import partial

import pytest
import torch

from sj_robust.attacks import fgsm
from sj_robust.evaluation import Score, ThreatModel, accuracy, environment, evaluate_attacks

THREAT = ThreatModel("Linf", 0.2)


@pytest.fixture
def batches(margins):
    _, x, y = margins
    return [(x[:3], y[:3]), (x[3:], y[3:])]


def test_scores_are_counts_over_all_batches(margins, batches):
    model, seen = margins[0], []
    attacks = {"fgsm": partial(fgsm, eps=0.2)}
    report = evaluate_attacks(
        model, batches, attacks, threat=THREAT, network="n", on_batch=lambda: seen.append(1)
    )
    # Within 0.2 of the border are the images of margin 0.1 and 0.3.
    assert report.scores == (Score("n", "clean", 4, 5), Score("n", "fgsm", 2, 5))
    assert len(seen) == 2
    assert accuracy(model, batches, attacks) == {"clean": 4 / 5, "fgsm": 2 / 5}


def test_every_batch_gets_its_own_noise_and_the_seed_decides_it(margins, batches):
    seen = []

    def attack(model, x, y, *, generator):
        seen.append(torch.rand(3, generator=generator).tolist())
        return x

    for seed in (0, 0, 1):
        evaluate_attacks(margins[0], batches, {"a": attack}, threat=THREAT, seed=seed)
    assert seen[0] != seen[1]
    assert seen[:2] == seen[2:4]
    assert seen[0] != seen[4]


def test_wrong_use(margins, batches):
    model = margins[0]
    with pytest.raises(ValueError, match="'clean' is taken"):
        evaluate_attacks(model, batches, {"clean": partial(fgsm, eps=0.1)}, threat=THREAT)
    model[1].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits must be finite"):
        evaluate_attacks(model, batches, {}, threat=THREAT)


def test_environment_names_what_a_result_depends_on():
    found = environment()
    assert {
        "python",
        "torch",
        "sj_robust",
        "accelerate",
        "device",
        "commit",
        "threads",
    } <= found.keys()
