"""On a linear network the robust accuracy is known; every adaptive attack reaches it exactly."""

from functools import partial

import pytest
import torch
from attacks.oracle import linear_oracle
from attacks.table import predicted, seeded
from covering import each_in_turn

from sj_robust.attacks import apgd, autoattack, sapgd

# Untargeted losses get two classes: with more, a start can lead to one that is out of reach beside
# one that is not.
KNOWN = [
    (partial(apgd, steps=50, loss="ce"), 2, ["Linf", "L2"]),
    (partial(apgd, steps=50, loss="dlr"), 2, ["Linf", "L2"]),
    (
        partial(
            apgd,
            steps=50,
            loss="dlr_targeted",
            target_classes=4,
        ),
        5,
        ["Linf", "L2"],
    ),
    (
        partial(
            apgd,
            steps=50,
            loss="dlr_targeted",
            target_classes=7,
        ),
        8,
        ["L2"],
    ),
    (sapgd, 2, ["Linf"]),
]


CASES = []
for attack, classes, norms in KNOWN:
    CASES += each_in_turn([attack], [classes], norms)
WHOLE = partial(autoattack, attacks=["apgd-ce", "apgd-t", "fab-t"])
CASES += [pytest.param(WHOLE, 5, norm, marks=pytest.mark.slow) for norm in ("Linf", "L2")]


@pytest.mark.parametrize(("attack", "classes", "norm"), CASES)
def test_exactly_the_known_images_fall(attack, classes, norm):
    oracle = linear_oracle(classes, norm)

    def model(x):
        logits = oracle.model(x)
        out_of_reach = logits[:, :1] * 0 - 9  # one class more, for the ratio of the DLR losses
        return torch.cat([logits, out_of_reach], 1)

    options = {} if attack is sapgd else {"norm": norm}
    x_adv = attack(
        model,
        oracle.x,
        oracle.y,
        eps=oracle.eps,
        **options,
        generator=seeded(),
    )
    assert torch.equal(predicted(model, x_adv) == oracle.y, oracle.robust)
    assert 0.2 < oracle.robust.double().mean().item() < 0.8
