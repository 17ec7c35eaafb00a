"""The attacks and models of the table as fixtures, and trained networks."""

import importlib

import pytest
import torch
from attacks.moving_bars import moving_bars, trained_model
from attacks.table import (
    EVERY,
    MODELS,
    SEARCHES,
    Attack,
    PerStep,
    Trained,
    seeded,
    train,
)
from covering import each_in_turn
from torch import Tensor, nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import autoattack, spike_search

ON_MODELS = {
    name: row
    for name, row in SEARCHES.items()
    if not row.of_events and row.function is not autoattack
}
PAIRS = [*each_in_turn(ON_MODELS, MODELS), *each_in_turn(["sapgd"], MODELS), ("autoattack", "lif")]
"""Every attack on images on some model, and one of them on every one."""


def _of_each_kind(attacks: dict[str, Attack]) -> list[str]:
    """One attack of every function, and one more where it may also draw nothing or counts."""
    kinds = {}
    for name, attack in attacks.items():
        counts = "counts" in attack.limits
        kinds.setdefault((attack.function, attack.draws, counts), name)
    return list(kinds.values())


def _one_of(names):
    @pytest.fixture(params=names)
    def attack(request, monkeypatch) -> Attack:
        return _shortened(request.param, monkeypatch)

    return attack


attack = _one_of(EVERY)
search = _one_of(SEARCHES)  # a search asks the model
any_attack = _one_of(_of_each_kind(EVERY))
any_search = _one_of(_of_each_kind(SEARCHES))


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return untrained(request.param)


@pytest.fixture(params=PAIRS, ids="-".join)
def attack_and_model(request, monkeypatch) -> tuple[Attack, nn.Module]:
    name, model = request.param
    return _shortened(name, monkeypatch), untrained(model)


def _shortened(name: str, monkeypatch) -> Attack:
    """An attack by name; what runs other attacks gives them a small part of their iterations."""
    attack = EVERY[name]
    if attack.function is spike_search:
        module = importlib.import_module("sj_robust.attacks.spike_search")
        monkeypatch.setattr(module, "_STEPS", 5)
    return attack


def untrained(name: str) -> nn.Module:
    """A network for images [N, 1, 6, 6], in train mode as modules are when new."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MODELS[name]()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Seven images for the models; the linear one is right."""
    return EVERY["pgd"].samples()


@pytest.fixture(scope="session")
def trained() -> Trained:
    """A spiking network trained on 8 x 8 digits for some seconds; evaluation mode."""
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn (extra `recipes`) holds the digits"
    )
    digits = datasets.load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target, dtype=torch.int64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        order = torch.randperm(len(x))
        x = x[order]
        y = y[order]
        net = nn.Sequential(
            PerStep(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)),
            DLIFNode(T=4, tau=2.0),
            PerStep(
                nn.Conv2d(
                    12,
                    24,
                    3,
                    stride=2,
                    padding=1,
                ),
                nn.BatchNorm2d(24),
            ),
            DLIFNode(T=4, tau=2.0),
            PerStep(nn.Flatten(), nn.Linear(24 * 16, 10)),
        )
        model = train(
            SpikingClassifier(net, T=4),
            x[:1280],
            y[:1280],
            epochs=4,
            size=64,
        )
    return Trained(model, x[1280:1580], y[1280:1580])


@pytest.fixture(scope="session")
def bars() -> Trained:
    """A spiking network trained on event frames for a second; evaluation mode."""
    return Trained(trained_model(), *moving_bars(32, seeded(1)))
