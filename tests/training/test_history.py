from dataclasses import asdict, dataclass

import pytest

from sj_robust.training.history import EpochRecord, catastrophic_overfitting


@dataclass(frozen=True)
class Epoch:
    """Validation accuracy."""

    clean: float
    fgsm: float
    pgd: float


def warning_after(epochs):
    history = []
    for number, epoch in enumerate(epochs, 1):
        record = EpochRecord(
            epoch=number,
            losses={},
            validation=asdict(epoch),
            lr=0.1,
        )
        history.append(record)
    return catastrophic_overfitting(history)


HEALTHY = Epoch(clean=0.80, fgsm=0.55, pgd=0.45)


@pytest.mark.parametrize(
    "epochs",
    [
        [HEALTHY, Epoch(clean=0.85, fgsm=0.90, pgd=0.10)],  # FGSM above clean, PGD gone
        [
            HEALTHY,
            Epoch(clean=0.85, fgsm=0.70, pgd=0.20),
            Epoch(clean=0.85, fgsm=0.80, pgd=0.05),  # FGSM far above PGD
        ],
        [
            Epoch(clean=0.80, fgsm=0.10, pgd=0.08),  # PGD was low from the start
            Epoch(clean=0.85, fgsm=0.88, pgd=0.01),
        ],
    ],
)
def test_catastrophic_overfitting_is_seen(epochs):
    warning = warning_after(epochs)
    assert f"epoch {len(epochs)}" in warning
    assert f"{epochs[-1].pgd:.1%} under PGD" in warning


@pytest.mark.parametrize(
    "epochs",
    [
        [],
        [Epoch(clean=0.5, fgsm=0.2, pgd=0.1)],
        [HEALTHY, Epoch(clean=0.85, fgsm=0.60, pgd=0.50)],  # healthy still
        [HEALTHY, Epoch(clean=0.85, fgsm=0.58, pgd=0.40)],  # noise
        [
            Epoch(clean=0.90, fgsm=0.55, pgd=0.45),
            Epoch(clean=0.30, fgsm=0.20, pgd=0.18),  # everything falls
        ],
        [
            Epoch(clean=0.98, fgsm=0.70, pgd=0.60),
            Epoch(clean=0.98, fgsm=0.71, pgd=0.50),  # an undefended network
        ],
    ],
)
def test_nothing_is_said_of_other_histories(epochs):
    assert warning_after(epochs) is None
