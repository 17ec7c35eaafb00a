"""AutoAttack of pyautoattack run by our own loop: its single runs are the library's, all around them is not.

The library's own loop seeds torch's global generators of every device, takes away the tracer of ``sys.settrace``, adds
to ``.grad`` of the parameters (FAB), fails with fewer than ten classes, and trusts an attack's word.
"""

import sys
from dataclasses import replace

import torch
from torch import Tensor

from sj_robust.attacks._pyautoattack import Log, Network, Settings, as_images, library, runs, square_run
from sj_robust.attacks.call import Model, Objective
from sj_robust.attacks.threat import ThreatModel
from sj_robust.randomness import Private, SampleDraws, SampleSeeds, draw_seed, seeded_globals

__all__ = ["ATTACKS", "VERSIONS", "AutoAttackWarning", "run_attacks", "search_squares"]

ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # which the denominators of the DLR losses need
_CHECKED_IMAGES = 250  # AutoAttack's own batch size


class AutoAttackWarning(UserWarning):
    """What AutoAttack's checks say about the network: its result may be unreliable."""


VERSIONS = {
    "standard": Settings(("apgd-ce", "apgd-t", "fab-t", "square")),
    "plus": Settings(("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"), apgd_restarts=5, fab_restarts=5),
    "rand": Settings(("apgd-ce", "apgd-dlr"), eot_samples=20),
}


@torch.no_grad()
def run_attacks(
    model: Model, x: Tensor, y: Tensor, *, ball: ThreatModel, settings: Settings, private: Private
) -> tuple[Tensor, list[str]]:
    """Images that fool where an attack found some, ``x`` elsewhere; and what the library has to say."""
    network, log, x_adv = Network(model, x.dtype), Log(), x.clone()
    logits = _clean_logits(network, x, y)
    standing, classes = logits.argmax(1) == y, logits.shape[1]
    if not bool(standing.any()):
        return x_adv, []
    settings = _possible(settings, classes, log)
    _check(network, x[:_CHECKED_IMAGES], y[:_CHECKED_IMAGES], settings, log)
    seed, seeds = draw_seed(private), _sample_seeds(private)
    accuracy = {"clean": float(standing.double().mean())}
    for name in settings.attacks:
        if not bool(standing.any()):
            break
        if name != "square":
            _require_gradient(model, x[standing][:1], y[standing][:1])
        with seeded_globals(seed, x.device):
            for number, run in enumerate(runs(name, network, ball, settings, classes=classes, log=log)):
                rows = standing.nonzero().squeeze(1)
                if len(rows) == 0:
                    break
                picked = None if seeds is None else seeds.rows(rows).derived(name, number)
                found = ball.project(x[rows], _finite(run(x[rows], y[rows], picked), name))
                fooled = ~network.right(found, y[rows])
                x_adv[rows[fooled]] = found[fooled]
                standing[rows[fooled]] = False
        accuracy[name] = float(standing.double().mean())
    library().checks.check_square_sr(accuracy, logger=log)
    return x_adv, log.summary()


@torch.no_grad()
def search_squares(model: Model, x: Tensor, y: Tensor, *, ball: ThreatModel, queries: int, private: Private) -> Tensor:
    """Best images of the Square Attack; ``x`` where the model is wrong already."""
    network, x_adv, seeds = Network(model, x.dtype), x.clone(), _sample_seeds(private)
    rows = (_clean_logits(network, x, y).argmax(1) == y).nonzero().squeeze(1)
    if len(rows):
        picked = None if seeds is None else seeds.rows(rows).derived("square", 0)
        with seeded_globals(draw_seed(private), x.device):
            found = square_run(network, ball, queries)(x[rows], y[rows], picked)
        x_adv[rows] = ball.project(x[rows], found)
    return x_adv


def _clean_logits(network: Network, x: Tensor, y: Tensor) -> Tensor:
    logits = network.logits(x, y)
    if logits.shape[1] < 2:
        raise ValueError(f"the model must return at least 2 classes, got {logits.shape[1]}; return one logit per class")
    return logits


def _sample_seeds(private: Private) -> SampleSeeds | None:
    return private.seeds if isinstance(private, SampleDraws) else None


def _possible(settings: Settings, classes: int, log: Log) -> Settings:
    """Without the attacks that the number of classes does not allow, each with a warning."""
    left_out = [name for name in settings.attacks if classes < _LEAST_CLASSES.get(name, 2)]
    for name in left_out:
        log.warning(f"{name} is left out: it needs at least {_LEAST_CLASSES[name]} classes, the model has {classes}")
    kept = tuple(name for name in settings.attacks if name not in left_out)
    if not kept:
        raise ValueError(f"none of the attacks {settings.attacks} can attack {classes} classes; add 'apgd-ce' or 'fab'")
    return replace(settings, attacks=kept)


def _check(network: Network, x: Tensor, y: Tensor, settings: Settings, log: Log) -> None:
    """The library's checks of the network, which leave its counters and the caller's tracer as they were."""
    checks = library().checks
    images = as_images(x)
    if settings.eot_samples == 1:
        checks.check_randomized(network, images, y, logger=log)
    checks.check_range_output(network, images, logger=log)
    counts, tracer = dict(checks.funcs), sys.gettrace()
    checks.funcs.update(dict.fromkeys(counts, 0))  # else a dynamic network seen before marks all later ones
    try:
        checks.check_dynamic(network, images, logger=log)
    finally:
        sys.settrace(tracer)
        checks.funcs.update(counts)


def _require_gradient(model: Model, x: Tensor, y: Tensor) -> None:
    """The errors of the gradient attacks for a model without a gradient or with one that is not finite."""
    with torch.enable_grad():
        Objective(model).gradient(x, y)


def _finite(images: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(images).all()):
        raise ValueError(
            f"{name} must find finite images, got NaN or infinity: the gradient was not finite; craft in float32"
        )
    return images
