import pytest

from sj_robust.training.journal import EpochRecord, catastrophic_overfitting

HEALTHY = (0.80, 0.55, 0.45)
"""Validation accuracy: clean, FGSM, PGD."""


def warned(epochs):
    history = []
    for number, accuracies in enumerate(epochs, 1):
        validation = dict(zip(("clean", "fgsm", "pgd"), accuracies, strict=True))
        history.append(EpochRecord(number, {}, validation, 0.1))
    return catastrophic_overfitting(history) is not None


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([HEALTHY, (0.85, 0.90, 0.10)], True),  # FGSM above clean, PGD gone
        ([HEALTHY, (0.85, 0.70, 0.20), (0.85, 0.80, 0.05)], True),  # FGSM far above PGD
        ([(0.80, 0.10, 0.08), (0.85, 0.88, 0.01)], True),  # PGD was low from the start
        ([], False),
        ([(0.5, 0.2, 0.1)], False),
        ([HEALTHY, (0.85, 0.60, 0.50)], False),  # healthy still
        ([HEALTHY, (0.85, 0.58, 0.40)], False),  # noise
        ([(0.90, 0.55, 0.45), (0.30, 0.20, 0.18)], False),  # everything falls
        ([(0.98, 0.70, 0.60), (0.98, 0.71, 0.50)], False),  # an undefended network
    ],
)
def test_catastrophic_overfitting_is_seen(epochs, expected):
    assert warned(epochs) == expected
