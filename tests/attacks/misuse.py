"""Misuse of attacks, threats and estimators: rows of the table of ``misuse_rooms``."""

import math
from functools import partial

import torch
from attacks.table import frames, linear_model, predicted, seeded
from misuse_rooms import Misuse, rows
from torch import nn

from sj_robust.attacks import (
    SampleSeeds,
    ThreatModel,
    apgd,
    autoattack,
    count_flips,
    count_moves,
    external,
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
    transfer,
    uniform,
)
from sj_robust.core.eps import parse_eps
from sj_robust.core.host import neuron
from sj_robust.estimators import estimator
from sj_robust.estimators.applied import Estimator

LINEAR = linear_model(36)
X = torch.rand(3, 1, 6, 6, generator=seeded(0))
X[1, 0, 0, 1] = 1.0  # so that a model which takes the elements for logits is right about one image
Y = torch.tensor([0, 1, 4])
FRAMES = frames(3, 3, 2, 2, 3)
NAN = math.nan

NOISES = [gaussian, uniform, salt_and_pepper]
GRADIENT = [fgsm, rfgsm, pgd, apgd, sapgd, spike_search]
SEARCHES = [*GRADIENT, square, autoattack]
GUIDED = [flip_events, move_events]
ON_EVENTS = [*GUIDED, random_flips, random_moves]
MUST = {
    gaussian: {"std": 0.1},
    salt_and_pepper: {"amount": 0.1},
    apgd: {"eps": 0.1, "keep_best": False},
    sapgd: {"eps": 0.1, "keep_best": False},
    **{attack: {"eps": 3} for attack in ON_EVENTS},
}
"""What an attack must be given, where it is not ``eps`` alone."""


def called(attack):
    x = FRAMES if attack in ON_EVENTS else X
    return partial(attack, model=LINEAR, x=x, y=Y, **MUST.get(attack, {"eps": 0.1}))


def each(attacks, *changes, error=ValueError, name=""):
    """The same changes of the calls of several attacks."""
    misuses = []
    for attack in attacks:
        misuses += [Misuse(called(attack), change, error, name) for change in changes]
    return misuses


def replaced(value):
    x = X.clone()
    x[1, 0, 2, 2] = value
    return {"x": x}


def model(forward, error=ValueError, name="logits"):
    """A network that gives what no attack can use."""
    return [Misuse(called(attack), {"model": forward}, error, name) for attack in SEARCHES]


def returning(found, error=ValueError, name="attack", **options):
    """What an attack of another package gives back."""
    attack = external(lambda x, y: found(x), **{"eps": 0.1, **options})
    return Misuse(attack.__call__, {"model": LINEAR, "x": 0.1 + 0.8 * X, "y": Y}, error, name)


def threat(*changes, error=ValueError, **right):
    return rows(
        partial(ThreatModel, **{"norm": "Linf", "eps": 0.1, **right}), *changes, error=error
    )


def entered(name, *layers, error=ValueError, named):
    """An estimator of a network that it does not fit."""

    def inside():
        with estimator(name)(nn.Sequential(*layers)):
            pass

    return Misuse(inside, {}, error, named)


def searched(change, error=ValueError):
    return Misuse(called(spike_search), change, error)


MISUSE = [
    *each(
        [*NOISES, *SEARCHES],
        replaced(NAN),
        replaced(math.inf),
        replaced(-0.01),
        replaced(1 + 2**-23),
        {"x": X * 255},
        {"x": X[0, 0, 0]},
    ),
    *each([*NOISES, *SEARCHES], {"x": (X * 255).byte()}, {"x": X.tolist()}, error=TypeError),
    *each(
        [*NOISES, *SEARCHES, *ON_EVENTS],
        {"y": Y.int()},
        {"y": nn.functional.one_hot(Y, 5).float()},
        {"y": Y.tolist()},
        error=TypeError,
    ),
    *each(
        [*NOISES, *SEARCHES, *ON_EVENTS],
        {"y": Y[:2]},
        {"y": Y[:, None]},
        {"y": torch.tensor([0, -1, 2])},
        {"y": Y.to("meta")},
    ),
    *each([*NOISES, *SEARCHES, *ON_EVENTS], {"generator": SampleSeeds([1])}, name="seed"),
    *each([*NOISES, *SEARCHES, *ON_EVENTS], {"generator": 0}, {"model": 3}, error=TypeError),
    *each([*SEARCHES, *GUIDED], {"model": None}, error=TypeError),
    *each([*SEARCHES, *GUIDED], {"y": torch.tensor([0, 5, 1])}),
    *each([*SEARCHES, uniform], {"eps": 8}, {"eps": -0.1}, {"eps": NAN}, {"eps": "0.1.2"}),
    *each([*SEARCHES, uniform], {"eps": True}, {"eps": ThreatModel("L0", 3)}),
    *each([fgsm, rfgsm, sapgd, uniform], {"eps": ThreatModel("L2", 0.1)}),
    *each([pgd, apgd, sapgd], {"steps": 0}, {"restarts": 0}, {"eot_samples": 0}),
    *each([pgd, apgd, sapgd], {"steps": 2.5}, {"eot_samples": 1.0}, error=TypeError),
    *each([fgsm, pgd, apgd, sapgd], {"loss": lambda z, y: z.sum()}),
    *each([rfgsm, pgd], {"step_size": 0.0}, {"step_size": 2.0}),
    *each([rfgsm], {"noise_std": -1}),
    *each([pgd], {"restarts": 2, "random_start": False}, {"stop_early": True, "keep_best": False}),
    *each([apgd], {"target_classes": 0}, {"loss": "cw"}, {"loss": None}),
    *each([gaussian], {"std": 8}),
    *each([salt_and_pepper], {"amount": 1.1}, {"amount": -0.1}),
    *each([salt_and_pepper], {"amount": "half"}, error=TypeError),
    *each([square], {"queries": 0}, {"eot_samples": 0}),
    *each([autoattack], {"version": "best"}, {"attacks": ["pgd"]}, {"attacks": "square"}),
    *each([square, autoattack], {"x": X.flatten(1)}, name="Square"),
    *model(lambda x: (x.flatten(1), None), TypeError, "model"),
    *model(lambda x: x.argmax(1), TypeError),
    *model(lambda x: x.flatten(2)),
    *model(lambda x: x.flatten(1)[:2]),
    *model(lambda x: x.flatten(1) / 0.0),
    *each(
        GRADIENT,
        {"model": lambda x: x.detach().flatten(1)},
        {"model": lambda x: LINEAR(x.detach())},
        error=RuntimeError,
        name="images",
    ),
    *each(
        GRADIENT,
        {"model": lambda x: (x.flatten(1) - x.flatten(1).detach()).sqrt()},
        name="gradient",
    ),
    *each(
        [spike_search, square, autoattack, *GUIDED],
        {"model": lambda x: x.flatten(1)[:, :1], "y": Y * 0},
        name="classes",
    ),
    *(
        Misuse(
            called(apgd),
            {"model": lambda x, few=few: x.flatten(1)[:, :few], "loss": loss, "y": Y * 0} | more,
            name="loss",
        )
        for loss, few in (("dlr", 2), ("dlr_targeted", 3))
        for more in ({}, {"keep_best": True})
    ),
    *(
        searched(change)
        for change in (
            {"forwards": 0},
            {"batch_size": 0},
            {"moves": ["spin"]},
            {"moves": []},
            {"starts": X},
            {"starts": []},
        )
    ),
    Misuse(called(spike_search), {"starts": 2 * torch.ones(1, 3, 1, 6, 6)}, name="x"),
    Misuse(called(spike_search), {"moves": ["flip"], "y": predicted(LINEAR, X)}, name="flips"),
    *(searched({"starts": starts}, TypeError) for starts in ("clean", [1], 1)),
    *each(
        ON_EVENTS,
        {"x": FRAMES * 2.5},
        {"x": FRAMES * 0.5},
        {"x": FRAMES * NAN},
        {"x": FRAMES[0]},
        {"x": FRAMES.flatten(3)},
        {"x": FRAMES.flatten(2)},
        {"x": frames(3, 3, 6, 2, 2)},
    ),
    *each(ON_EVENTS, {"x": frames(5, 3, 2, 2, 3)}, name="y"),
    *each(ON_EVENTS, {"x": FRAMES.byte()}, {"x": FRAMES.tolist()}, error=TypeError),
    *each(ON_EVENTS, {"eps": -1}, {"eps": 2.5}, {"eps": True}, {"eps": ThreatModel("Linf", 0.1)}),
    *each(ON_EVENTS, {"eot_samples": 0}),
    *each(GUIDED, {"steps": 0}, {"restarts": 0}, {"probes": -1}, {"confidence": -1.0}),
    *each(GUIDED, {"target_classes": 5}),
    *each(GUIDED, {"queries": 1.5}, error=TypeError),
    *each([flip_events, random_flips], {"allow": "flip"}, {"eps": ThreatModel("moves", 3)}),
    *each([move_events, random_moves], {"eps": ThreatModel("L0", 3)}),
    *each([random_flips, random_moves], {"tries": 0}, {"tries": 2, "model": None}),
    *each(GUIDED, {"model": lambda x: LINEAR(x.detach())}, error=RuntimeError, name="images"),
    *rows(partial(count_flips, x=FRAMES), {"x_adv": FRAMES[:1]}, {"x_adv": FRAMES * NAN}),
    *rows(partial(count_moves, x=FRAMES), {"x_adv": FRAMES[:1]}, {"x_adv": FRAMES / 0}),
    *rows(partial(external, lambda x, y: x), {"eps": 8}, {"eps": ThreatModel("L0", 3)}),
    *rows(partial(external, eps=0.1), {"attack": None}, error=TypeError),
    *rows(partial(transfer, LINEAR), {"attack": None}, error=TypeError),
    *rows(partial(transfer, attack=called(fgsm)), {"source": None}, error=TypeError),
    Misuse(transfer(LINEAR, called(fgsm)).__call__, {"model": None, "x": X, "y": Y}, TypeError),
    Misuse(external(lambda x, y: x, eps=0.1).__call__, {"x": X * 255, "model": LINEAR, "y": Y}),
    returning(lambda x: x - 0.15 * (x - 0.5).sign(), name="eps"),
    returning(lambda x: x + 0.1001 * (torch.arange(3) == 2).view(3, 1, 1, 1), name="eps"),
    returning(lambda x: x + 0.05, eps=ThreatModel("L2", 0.29), name="eps"),
    returning(lambda x: torch.where(x > 0.6, torch.nan, x)),
    returning(lambda x: 1.3 * x),
    returning(lambda x: x - 0.5),
    returning(lambda x: x[:2]),
    returning(lambda x: x.double()),
    returning(lambda x: x.to("meta")),
    returning(lambda x: (x, x), TypeError),
    returning(lambda x: x.numpy(), TypeError),
    *rows(SampleSeeds, {"seeds": [-1]}, {"seeds": [2**62]}),
    *rows(
        SampleSeeds, {"seeds": [1.5]}, {"seeds": [True]}, {"seeds": torch.rand(3)}, error=TypeError
    ),
    *rows(SampleSeeds, {"seeds": torch.zeros(2, 2, dtype=torch.int64)}, error=TypeError),
    *threat({"norm": "L1"}, {"eps": -0.1}, {"eps": 8}, {"counts": True}),
    *threat({"eps": "0.1"}, error=TypeError),
    *threat({"eps": math.inf}, norm="L2"),
    *threat(*({"eps": eps} for eps in (-1, 0.5, 2.5, True, math.inf, NAN)), norm="L0"),
    *threat({"largest_shift": 1}, norm="L0", eps=3),
    *threat({"counts": "yes"}, norm="L0", eps=3, error=TypeError),
    *threat({"largest_shift": -1}, {"total_shift": 0}, norm="moves", eps=3),
    *(Misuse(partial(parse_eps, text), {}, name="eps") for text in ("8//255", "x", "8/0", "nan")),
    *(
        Misuse(partial(estimator, text), {}, name=name)
        for text, name in (
            ("bptt", "bptt"),
            ("", "estimator"),
            ("atan:0", "atan"),
            ("atan:-1", "atan"),
            ("hart:nan", "hart"),
            ("triangle:inf", "triangle"),
            ("atan:wide", "atan:wide"),
            ("atan:1:2", "atan:1:2"),
            ("bptr:1", "bptr"),
            ("assg:cube", "assg"),
            ("assg:1", "assg"),
            ("rga+detach", "rga"),
            ("cba+detach", "cba"),
            ("atan:4+attach", "atan:4+attach"),
        )
    ),
    *rows(estimator, {"name": 4.0}, error=TypeError),
    *rows(partial(Estimator, "atan", 4.0), {"shape": "triangle"}),
    Misuse(lambda: estimator("atan:4")(len).__enter__(), {}, TypeError, "network"),
    entered("atan:4", nn.Linear(2, 2), named="training"),
    entered("cba", nn.Linear(2, 2), named="training"),
    entered("triangle:1", neuron.IFNode(v_threshold=-1.0), named="threshold"),
    entered("rga", neuron.IFNode(v_reset=1.5, step_mode="m"), named="thresholds"),
    *(
        entered(name, neuron.LIFNode(step_mode="s"), named="set_step_mode")
        for name in ("bptr", "rga", "hart", "hart_mixed")
    ),
]
