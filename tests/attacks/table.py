"""One table of attacks and one of models; every property is tested over their product."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust._host import functional, neuron
from sj_robust.attacks import apgd, fgsm, gaussian, pgd, rfgsm, salt_and_pepper, sapgd, uniform

torch.set_num_threads(1)


class Attack(NamedTuple):
    """An attack of radius eps, called as ``run(model, x, y, eps, generator)``."""

    run: Callable[..., Tensor]
    norm: str | None  # None: no ball, only the box
    draws: bool = True  # whether the attack itself is random


def _pgd(**options) -> Callable[..., Tensor]:
    def run(model, x, y, eps, generator=None):
        return pgd(model, x, y, eps=eps, step_size=eps / 2, steps=3, generator=generator, **options)

    return run


def _stepping(attack, **options) -> Attack:
    """An attack of the APGD kind at few steps; "Linf" unless the options say otherwise."""
    options = {"steps": 4, **options}

    def run(model, x, y, eps, generator=None):
        return attack(model, x, y, eps=eps, generator=generator, **options)

    return Attack(run, options.get("norm", "Linf"))


NOISES = {
    "gaussian": Attack(lambda m, x, y, eps, g=None: gaussian(m, x, y, std=eps, generator=g), None),
    "uniform": Attack(lambda m, x, y, eps, g=None: uniform(m, x, y, eps=eps, generator=g), "Linf"),
    "salt_and_pepper": Attack(lambda m, x, y, eps, g=None: salt_and_pepper(m, x, y, amount=eps, generator=g), None),
}

ATTACKS = {
    **NOISES,
    "fgsm": Attack(lambda m, x, y, eps, g=None: fgsm(m, x, y, eps=eps, generator=g), "Linf", draws=False),
    "fgsm_targeted": Attack(
        lambda m, x, y, eps, g=None: fgsm(m, x, y, eps=eps, targeted=True, generator=g), "Linf", draws=False
    ),
    "rfgsm": Attack(lambda m, x, y, eps, g=None: rfgsm(m, x, y, eps=eps, generator=g), "Linf"),
    "rfgsm_long": Attack(lambda m, x, y, eps, g=None: rfgsm(m, x, y, eps=eps, step_size=2 * eps, generator=g), "Linf"),
    "rfgsm_unprojected": Attack(lambda m, x, y, eps, g=None: rfgsm(m, x, y, eps=eps, project=False, generator=g), None),
    "pgd": Attack(_pgd(), "Linf"),
    "pgd_last": Attack(_pgd(keep_best=False), "Linf"),
    "pgd_no_start": Attack(_pgd(random_start=False), "Linf", draws=False),
    "pgd_restarts": Attack(_pgd(restarts=3), "Linf"),
    "pgd_last_restarts": Attack(_pgd(restarts=2, keep_best=False), "Linf"),
    "pgd_targeted": Attack(_pgd(targeted=True), "Linf"),
    "pgd_eot": Attack(_pgd(eot_samples=2), "Linf"),
    "pgd_l2": Attack(_pgd(norm="L2"), "L2"),
    "pgd_l2_last": Attack(_pgd(norm="L2", keep_best=False), "L2"),
    "pgd_l2_restarts": Attack(_pgd(norm="L2", restarts=2, targeted=True), "L2"),
    "apgd": _stepping(apgd),
    "apgd_highest": _stepping(apgd, keep_best=False),
    "apgd_restarts": _stepping(apgd, restarts=2),
    "apgd_eot": _stepping(apgd, eot_samples=2),
    "apgd_dlr": _stepping(apgd, loss="dlr"),
    "apgd_targeted": _stepping(apgd, loss="dlr_targeted", target_classes=2),
    "apgd_l2": _stepping(apgd, norm="L2"),
    "apgd_l2_dlr_highest": _stepping(apgd, norm="L2", loss="dlr", keep_best=False),
    "apgd_l2_targeted": _stepping(apgd, norm="L2", loss="dlr_targeted", target_classes=2, restarts=2),
    "sapgd": _stepping(sapgd),
    "sapgd_highest": _stepping(sapgd, keep_best=False),
    "sapgd_restarts": _stepping(sapgd, restarts=2, eot_samples=2),
}


def linear_model(features: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Linear classifier of flattened images into five classes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(features, 5)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(5, features, generator=generator))
        model[1].bias.zero_()
    return model


def _conv_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )


class PerStep(nn.Module):
    """A stateless network applied to [T, N, *] as to one batch, whatever the release calls its own container."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x_seq: Tensor) -> Tensor:
        return self.layers(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


def _spiking_model(make_neuron: Callable[[], nn.Module]) -> nn.Module:
    net = nn.Sequential(
        PerStep(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)),
        make_neuron(),
        PerStep(nn.Dropout(0.2), nn.Flatten(), nn.Linear(4 * 36, 5)),
    )
    functional.set_step_mode(net, "m")
    return SpikingClassifier(net, T=3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: linear_model(36),
    "conv": _conv_model,
    "dlif": lambda: _spiking_model(lambda: DLIFNode(T=3, tau=2.0)),
    "lif": lambda: _spiking_model(lambda: neuron.LIFNode(tau=2.0, decay_input=False)),
}
