"""On a spiking network that has learned something: strength, order of strength, agreement with
torchattacks.
"""

import pytest
from attacks.table import predicted, seeded
from torch import Tensor

from sj_robust.attacks import fgsm, gaussian, pgd

pytestmark = pytest.mark.slow

EPS = 0.1


def correct(trained, x: Tensor) -> Tensor:
    return predicted(trained.model, x) == trained.y


def test_stronger_attacks_leave_less(trained):
    model, x, y = trained
    accuracy = [
        correct(trained, x_adv).float().mean().item()
        for x_adv in (
            x,
            gaussian(model, x, y, std=EPS, generator=seeded()),
            fgsm(model, x, y, eps=EPS),
            pgd(
                model,
                x,
                y,
                eps=EPS,
                step_size=EPS / 4,
                steps=10,
                generator=seeded(),
            ),
        )
    ]
    clean, noise, single_step, iterated = accuracy
    assert clean > 0.93
    assert noise > clean - 0.1
    assert single_step < clean - 0.15
    assert iterated < single_step


def test_keep_best_and_restarts_never_lose_against_the_usual_practice(trained):
    model, x, y = trained

    def left(**options) -> Tensor:
        generator = seeded()
        return correct(
            trained,
            pgd(
                model,
                x,
                y,
                eps=EPS,
                step_size=EPS / 4,
                steps=7,
                generator=generator,
                **options,
            ),
        )

    last = left(keep_best=False)
    best = left()
    restarted = left(restarts=3)
    # Predictions may differ in single images where another batch size rounds a potential to the
    # other side.
    assert int((best & ~last).sum()) <= 1
    assert int((restarted & ~best).sum()) <= 1
    assert int(restarted.sum()) < int(best.sum()) < int(last.sum())


def test_every_image_falls_when_the_radius_is_one(trained):
    x_adv = pgd(
        *trained,
        eps=1.0,
        step_size=0.1,
        steps=40,
        restarts=3,
        generator=seeded(),
    )
    found = correct(trained, x_adv).float().mean().item()
    assert found < 0.02


@pytest.mark.parametrize(
    ("peer", "norm", "eps", "step_size", "steps"),
    [
        ("PGD", "Linf", 0.1, 0.0125, 20),
        ("PGD", "Linf", 8 / 255, 2 / 255, 10),
        ("PGDL2", "L2", 1.0, 0.2, 10),
    ],
)
def test_predictions_agree_with_torchattacks(trained, peer, norm, eps, step_size, steps):
    torchattacks = pytest.importorskip(
        "torchattacks", reason="extra `compare` holds the peers of parity tests"
    )
    model, x, y = trained
    options = {"eps": eps, "steps": steps, "random_start": False}
    ours = pgd(
        model,
        x,
        y,
        **options,
        step_size=step_size,
        norm=norm,
        keep_best=False,
    )
    theirs = getattr(torchattacks, peer)(model, **options, alpha=step_size)(x, y)
    found = (predicted(model, ours) == predicted(model, theirs)).float().mean().item()
    assert found >= 0.995
    found = int(correct(trained, ours).sum())
    expected = int(correct(trained, x).sum())
    assert found < expected
