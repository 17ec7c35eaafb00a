import pytest

from sj_robust.training import EpochRecord, catastrophic_overfitting


def history(*epochs):
    return [
        EpochRecord(number + 1, {}, dict(zip(("clean", "fgsm", "pgd"), figures, strict=True)), 0.1)
        for number, figures in enumerate(epochs)
    ]


@pytest.mark.parametrize(
    "epochs",
    [
        [(0.80, 0.55, 0.45), (0.85, 0.90, 0.10)],  # FGSM above clean, PGD gone
        [(0.80, 0.55, 0.45), (0.85, 0.70, 0.20), (0.85, 0.80, 0.05)],  # FGSM far above PGD
        [(0.80, 0.10, 0.08), (0.85, 0.88, 0.01)],  # PGD was low from the start
    ],
)
def test_it_is_seen(epochs):
    warning = catastrophic_overfitting(history(*epochs))
    assert f"epoch {len(epochs)}" in warning
    assert f"{epochs[-1][2]:.1%} under PGD" in warning


@pytest.mark.parametrize(
    "epochs",
    [
        [],
        [(0.5, 0.2, 0.1)],
        [(0.80, 0.55, 0.45), (0.85, 0.60, 0.50)],  # healthy
        [(0.80, 0.55, 0.45), (0.85, 0.58, 0.40)],  # noise
        [(0.90, 0.55, 0.45), (0.30, 0.20, 0.18)],  # everything falls
        [(0.98, 0.70, 0.60), (0.98, 0.71, 0.50)],  # an undefended network
    ],
)
def test_it_is_not_seen_where_it_is_not(epochs):
    assert catastrophic_overfitting(history(*epochs)) is None
