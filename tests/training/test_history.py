import pytest

from sj_robust.training import EpochRecord, catastrophic_overfitting


@pytest.mark.parametrize(
    ("epochs", "seen"),  # validation accuracy: clean, under FGSM, under PGD
    [
        ([(0.80, 0.55, 0.45), (0.85, 0.90, 0.10)], True),  # FGSM above clean, PGD gone
        ([(0.80, 0.55, 0.45), (0.85, 0.70, 0.20), (0.85, 0.80, 0.05)], True),  # FGSM far above PGD
        ([(0.80, 0.10, 0.08), (0.85, 0.88, 0.01)], True),  # PGD was low from the start
        ([], False),
        ([(0.5, 0.2, 0.1)], False),
        ([(0.80, 0.55, 0.45), (0.85, 0.60, 0.50)], False),  # healthy
        ([(0.80, 0.55, 0.45), (0.85, 0.58, 0.40)], False),  # noise
        ([(0.90, 0.55, 0.45), (0.30, 0.20, 0.18)], False),  # everything falls
        ([(0.98, 0.70, 0.60), (0.98, 0.71, 0.50)], False),  # an undefended network
    ],
)
def test_catastrophic_overfitting(epochs, seen):
    names = ("clean", "fgsm", "pgd")
    history = [
        EpochRecord(i, {}, dict(zip(names, row, strict=True)), 0.1)
        for i, row in enumerate(epochs, 1)
    ]
    warning = catastrophic_overfitting(history)
    assert (warning is not None) == seen
    if seen:
        assert f"epoch {len(epochs)}" in warning
        assert f"{epochs[-1][2]:.1%} under PGD" in warning
