"""The table of attacks and the one of networks, whose products are tested; and what many tests
share.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from unchanged import unchanged

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import (
    ThreatModel,
    apgd,
    autoattack,
    fgsm,
    flip_events,
    gaussian,
    move_events,
    pgd,
    random_flips,
    random_moves,
    rfgsm,
    salt_and_pepper,
    sapgd,
    spike_search,
    square,
    uniform,
)
from sj_robust.core.host import functional, neuron

torch.set_num_threads(1)


class Attack(NamedTuple):
    """An attack with its options; those that are functions are functions of the radius. Limits are
    those of the threat beside its norm.
    """

    function: Callable[..., Tensor]
    options: dict[str, Any] = {}  # noqa: RUF012  no row changes its own
    norm: str | None = "Linf"  # None: no ball, only the box
    draws: bool = True  # whether the attack itself is random
    budget: str = "eps"
    limits: dict[str, Any] = {}  # noqa: RUF012  likewise

    def run(self, model, x: Tensor, y: Tensor, eps: float, generator=None) -> Tensor:
        plain = self.norm in ("Linf", None)
        options = {self.budget: eps if plain else self.threat(eps)}
        for name, value in self.options.items():
            options[name] = value(eps) if callable(value) else value
        return self.function(model, x, y, **options, generator=generator)

    def threat(self, eps: float) -> ThreatModel:
        return ThreatModel(self.norm, eps, **self.limits)

    @property
    def of_events(self) -> bool:
        return self.norm in ("L0", "moves")

    @property
    def usual(self) -> float:
        """A radius or a number of events that fools some of the samples."""
        if self.of_events:
            return 6
        return 1.0 if self.norm == "L2" else 0.2

    @property
    def small(self) -> float:
        """One that fools few."""
        return 1 if self.of_events else 0.1

    def samples(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Seven images or frames of 36 elements, and what the linear model says of them."""
        x = torch.rand(7, 1, 6, 6, generator=seeded(2))
        x[0, 0, 0] = 0.0  # on the border of the box
        x[1, 0, 1] = 1.0
        if self.of_events:
            x = self.frames(7, 3, 2, 2, 3, seed=2)
            x[6] = 0.0
            x[5] *= 4.0 if "counts" in self.limits else 1.0  # what no neighbour may notice
        return x.to(dtype), linear_model(36)(x).argmax(1)

    def frames(self, *shape: int, seed: int, share: float = 0.4, **options: Any) -> Tensor:
        """Frames of events, or of numbers of events."""
        x = frames(*shape, seed=seed, share=share, **options)
        if "counts" in self.limits:
            x *= torch.randint(1, 4, shape, generator=seeded(seed))
        return x

    def assert_within(self, x_adv: Tensor, x: Tensor, eps: float) -> None:
        """Samples of the same kind in the budget."""
        if not self.of_events:
            return assert_within(x_adv, x, self.norm, eps)
        assert_like(x_adv, x)
        given = self.options.get
        change = x_adv - x
        assert given("allow") != "add" or (change >= 0).all()
        assert given("allow") != "remove" or (change <= 0).all()
        assert (x_adv >= 0).all()
        assert "counts" in self.limits or (x_adv <= 1).all()
        assert torch.equal(x_adv, x_adv.round())
        size = change.double().abs().flatten(1).sum(1)
        if self.norm == "L0":
            assert (size <= eps).all()
            return None
        assert (change.sum(1) == 0).all()
        assert (size <= 2 * eps).all()
        assert self.threat(eps).contains(x, x_adv).all()
        return None


def _pgd(norm="Linf", *, draws: bool = True, **options) -> Attack:
    options = {"step_size": lambda eps: eps / 2, "steps": 3, **options}
    return Attack(pgd, options, norm, draws)


def _climbing(function, norm="Linf", **options) -> Attack:
    """An attack of the APGD kind at few steps."""
    return Attack(function, {"steps": 4, **options}, norm)


def _flips(function=flip_events, *, limits=None, **options) -> Attack:
    return Attack(function, options, "L0", limits=limits or {})


def _moves(function=move_events, *, limits=None, **options) -> Attack:
    return Attack(function, options, "moves", limits=limits or {})


NOISES = {
    "gaussian": Attack(gaussian, norm=None, budget="std"),
    "uniform": Attack(uniform),
    "salt_and_pepper": Attack(salt_and_pepper, norm=None, budget="amount"),
}

ATTACKS = {
    **NOISES,
    "fgsm": Attack(fgsm, draws=False),
    "fgsm_targeted": Attack(fgsm, {"targeted": True}, draws=False),
    "rfgsm": Attack(rfgsm),
    "rfgsm_long": Attack(rfgsm, {"step_size": lambda eps: 2 * eps}),
    "rfgsm_unprojected": Attack(rfgsm, {"project": False}, None),
    "pgd": _pgd(),
    "pgd_last": _pgd(keep_best=False),
    "pgd_no_start": _pgd(random_start=False, draws=False),
    "pgd_stop_early": _pgd(restarts=2, stop_early=True),
    "pgd_last_restarts": _pgd(restarts=2, keep_best=False),
    "pgd_eot": _pgd(eot_samples=2),
    "pgd_l2": _pgd(norm="L2"),
    "pgd_l2_restarts": _pgd(norm="L2", restarts=2, targeted=True),
    "apgd": _climbing(apgd),
    "apgd_highest": _climbing(apgd, keep_best=False),
    "apgd_eot": _climbing(apgd, eot_samples=2),
    "apgd_targeted": _climbing(apgd, loss="dlr_targeted", target_classes=2),
    "apgd_l2": _climbing(apgd, norm="L2"),
    "apgd_l2_dlr_highest": _climbing(apgd, norm="L2", loss="dlr", keep_best=False),
    "apgd_l2_targeted": _climbing(
        apgd, norm="L2", loss="dlr_targeted", target_classes=2, restarts=2
    ),
    "sapgd": _climbing(sapgd),
    "sapgd_highest": _climbing(sapgd, keep_best=False),
    "sapgd_restarts": _climbing(sapgd, restarts=2, eot_samples=2),
    "spike_search": Attack(spike_search, {"forwards": 120}),
    "spike_search_l2": Attack(spike_search, {"forwards": 96}, "L2"),
}

ON_IMAGES = {
    "square": Attack(square, {"queries": 60}),
    "square_l2": Attack(square, {"queries": 60}, "L2"),
    "autoattack": Attack(autoattack, {"attacks": ["apgd-ce"]}),
    "autoattack_fab": Attack(autoattack, {"attacks": ["apgd-ce", "fab-t"]}),
    "autoattack_l2": Attack(autoattack, {"attacks": ["apgd-t"]}, "L2"),
}
"""What attacks images [N, C, H, W] alone, or takes long."""

COUNTS = {"counts": True}
_FEW = {"probes": 2, "queries": 3}
_ALL_RUNS = {"target_classes": 2, "restarts": 3, **_FEW}

ON_EVENTS = {
    "flips": _flips(),
    "flips_add": _flips(allow="add", **_FEW),
    "flips_remove": _flips(allow="remove", **_FEW),
    "flips_gradient": _flips(probes=0, queries=0),
    "flips_one_step": _flips(steps=1, probes=0, queries=5),
    "flips_last": _flips(keep_best=False, reduce=False, queries=3),
    "flips_runs": _flips(**_ALL_RUNS),
    "flips_eot": _flips(eot_samples=2, confidence=0.5, **_FEW),
    "flips_counts": _flips(limits=COUNTS, **_FEW),
    "flips_counts_remove": _flips(limits=COUNTS, allow="remove", **_FEW),
    "moves": _moves(limits={"largest_shift": 1}),
    "moves_gradient": _moves(probes=0, queries=0),
    "moves_last": _moves(keep_best=False, reduce=False, queries=3),
    "moves_runs": _moves(limits={"total_shift": 4}, **_ALL_RUNS),
    "moves_counts": _moves(limits={"largest_shift": 1, **COUNTS}, **_FEW),
    "random_flips": _flips(random_flips),
    "random_flips_add": _flips(random_flips, allow="add", tries=3),
    "random_flips_remove": _flips(random_flips, allow="remove", tries=3),
    "random_flips_counts": _flips(random_flips, limits=COUNTS, tries=3),
    "random_moves": _moves(random_moves, limits={"total_shift": 9}, tries=3),
    "random_moves_counts": _moves(random_moves, limits={"largest_shift": 1, **COUNTS}, tries=3),
}
EVERY = ATTACKS | ON_IMAGES | ON_EVENTS
ASK_NOTHING = [*NOISES, "random_flips"]
SEARCHES = {name: row for name, row in EVERY.items() if name not in ASK_NOTHING}


def assert_like(x_adv: Tensor, x: Tensor) -> None:
    """Samples of the same kind, without a graph."""
    assert (x_adv.shape, x_adv.dtype, x_adv.device) == (x.shape, x.dtype, x.device)
    assert not x_adv.requires_grad
    assert not x_adv.is_inference()  # so that a network can be trained on them


def assert_within(x_adv: Tensor, x: Tensor, norm: str | None, eps: float) -> None:
    """Images of the same kind, inside the box and, exactly, inside the ball."""
    assert_like(x_adv, x)
    assert (x_adv >= 0).all()
    assert (x_adv <= 1).all()
    distance = x_adv.double() - x.double()
    if norm == "Linf" and x.numel():
        assert distance.abs().max().item() <= eps
        assert (x_adv - x).abs().max().item() <= eps
    if norm == "L2":
        for sample in distance.flatten(1).tolist():
            found = math.sqrt(math.fsum(d * d for d in sample))
            assert found <= eps * (1 + 1e-12)


def all_generators(shape) -> Tensor:
    """Noise from every global generator that a network may draw from."""
    return torch.rand(shape) + random.random() + np.random.rand()  # noqa: NPY002  the global one


@contextmanager
def left_as_it_was(
    model: nn.Module, fail_at: int | None = None, *, draws=torch.rand, evaluates=True
) -> Iterator[None]:
    """A network of mixed modes that draws from a global generator is as before in the end, and so
    are all of those.

    Its forward number ``fail_at`` raises an error, which has to come out; the others run in
    evaluation mode.
    """
    modules = list(model.modules())
    first, *_, last = model.parameters()
    calls = []
    for number, module in enumerate(modules):
        module.training = number % 3 != 0
    first.grad = torch.full_like(first, 3.0)
    last.requires_grad_(False)

    def before_forward(module, inputs):
        calls.append(inputs)
        assert not evaluates or not any(part.training for part in modules)
        if len(calls) == fail_at:
            raise KeyError("from the model")
        return inputs[0] + 1e-7 * draws(())

    model.register_forward_pre_hook(before_forward)
    error = pytest.raises(KeyError, match="from the model") if fail_at else nullcontext()
    with unchanged(model, hooked=[model], states=False), error:
        yield
    assert calls


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def predicted(model, x: Tensor) -> Tensor:
    return model(x).argmax(1)


def fooled(model, x: Tensor, y: Tensor) -> Tensor:
    """Which images the model is wrong about, [N] bool."""
    return predicted(model, x) != y


class Recorder:
    """Keeps every batch that a model is called with."""

    def __init__(self, model) -> None:
        self.model = model
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.model(x)

    @property
    def sizes(self) -> list[int]:
        return [len(x) for x in self.seen]


def frames(
    *shape: int, seed: int = 0, share: float = 0.3, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Frames of independent events."""
    return (torch.rand(shape, generator=seeded(seed)) < share).to(dtype)


def two_classes(lead: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Logits 0 of class 0 and ``lead(x)`` of class 1."""

    def model(x: Tensor) -> Tensor:
        margin = lead(x)
        return torch.stack([torch.zeros_like(margin), margin], 1)

    return model


def linear_model(
    features: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Module:
    """Linear classifier of flattened images into five classes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(features, 5)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(5, features, generator=generator))
        model[1].bias.zero_()
    return model


class Trained(NamedTuple):
    """A network that has learned something, and samples that it has not seen."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def accuracy(self, x: Tensor) -> float:
        return float((predicted(self.model, x) == self.y).float().mean())


def train(
    model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, size: int, generator=None
) -> nn.Module:
    """The network after some epochs in batches of a size; evaluation mode.

    It trains in float64, so that different processors, which round differently, end with the same
    network.
    """
    model.double()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows].double()), y[rows]).backward()
            optimizer.step()
    functional.reset_net(model)
    return model.float().eval()


class PerStep(nn.Module):
    """A stateless network applied to [T, N, *] as to one batch, whatever the release calls its own
    container.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x_seq: Tensor) -> Tensor:
        return self.layers(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


def _spiking_model(node: nn.Module) -> nn.Module:
    net = nn.Sequential(
        PerStep(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)),
        node,
        PerStep(nn.Dropout(0.2), nn.Flatten(), nn.Linear(4 * 36, 5)),
    )
    functional.set_step_mode(net, "m")
    return SpikingClassifier(net, T=3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: linear_model(36),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(144, 5),
    ),
    "dlif": lambda: _spiking_model(DLIFNode(T=3, tau=2.0)),
    "lif": lambda: _spiking_model(neuron.LIFNode(tau=2.0, decay_input=False)),
}
