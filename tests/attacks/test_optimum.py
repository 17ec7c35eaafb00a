"""On a linear network the robust accuracy is known; every adaptive attack reaches it exactly."""

from functools import partial

import pytest
import torch
from attacks.oracle import linear_oracle
from attacks.table import predicted, seeded

from sj_robust.attacks import ThreatModel, apgd, autoattack, fgsm, pgd, sapgd, spike_search

BALLS = ["Linf", "L2"]
# Untargeted losses get two classes: with more, a start can lead to one that is out of reach beside
# one that is not.
KNOWN = [
    (fgsm, 2, ["Linf"]),
    (partial(pgd, steps=50), 2, BALLS),
    (partial(apgd, steps=50, loss="ce"), 2, BALLS),
    (partial(apgd, steps=50, loss="dlr"), 2, BALLS),
    (partial(apgd, steps=50, loss="dlr_targeted", target_classes=4), 5, BALLS),
    (partial(apgd, steps=50, loss="dlr_targeted", target_classes=7), 8, ["L2"]),
    (sapgd, 2, ["Linf"]),
    (partial(spike_search, forwards=50), 2, BALLS),
]
CASES = [(attack, classes, norm) for attack, classes, norms in KNOWN for norm in norms]
WHOLE = partial(autoattack, attacks=["apgd-ce", "apgd-t", "fab-t"])
CASES.append(pytest.param(WHOLE, 5, "L2", marks=pytest.mark.slow))


@pytest.mark.parametrize(("attack", "classes", "norm"), CASES)
def test_exactly_the_known_images_fall(attack, classes, norm):
    oracle = linear_oracle(classes, norm)

    def model(x):
        logits = oracle.model(x)
        out_of_reach = logits[:, :1] * 0 - 9  # one class more, for the ratio of the DLR losses
        return torch.cat([logits, out_of_reach], 1)

    threat = ThreatModel(norm, oracle.eps)
    x_adv = attack(model, oracle.x, oracle.y, eps=threat, generator=seeded())
    assert torch.equal(predicted(model, x_adv) == oracle.y, oracle.robust)
    assert 0.2 < oracle.robust.double().mean().item() < 0.8
