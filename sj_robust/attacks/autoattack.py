"""AutoAttack: this package's APGD, FAB and Square, one after the other."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sj_robust.attacks._fab import fab
from sj_robust.attacks.apgd import LEAST_CLASSES, apgd
from sj_robust.attacks.averaged import averaged
from sj_robust.attacks.call import (
    Attack,
    Model,
    Objective,
    Randomness,
    checked_copies,
    isolated,
    seeds_of_samples,
)
from sj_robust.attacks.logits import clean_logits, differ
from sj_robust.attacks.projection import Norm
from sj_robust.attacks.square import check_square, square
from sj_robust.attacks.threat import ThreatModel, ball_threat
from sj_robust.core.randomness import draw_seed

__all__ = ["AutoAttackWarning", "autoattack"]

_CHECKED_IMAGES = 250
_CHECKED_FORWARDS = 5
_ITERATIONS = 100
_QUERIES = 5000
_TARGETS = 9
_SQUARE_ALONE = 0.002  # share of the images that Square may fool alone
_FEWEST = {"apgd-dlr": LEAST_CLASSES["dlr"], "apgd-t": LEAST_CLASSES["dlr_targeted"]}
"""Classes that an attack needs, where two are too few."""


class AutoAttackWarning(UserWarning):
    """A check of AutoAttack found that its result for this network may be unreliable."""


@dataclass(frozen=True)
class _Version:
    """What a version of AutoAttack runs."""

    attacks: tuple[str, ...]
    restarts: int = 1
    """Runs of the attacks without targets."""
    eot_samples: int = 1


_VERSIONS = {
    "standard": _Version(("apgd-ce", "apgd-t", "fab-t", "square")),
    "plus": _Version(("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"), restarts=5),
    "rand": _Version(("apgd-ce", "apgd-dlr"), eot_samples=20),
}


def autoattack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: Norm = "Linf",
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    generator: Randomness = None,
) -> Tensor:
    """AutoAttack: APGD, FAB and Square, one after the other, on the images that are still correct.

    AutoAttack 集成攻击。

    Equation: ``x_adv[n]`` is the first image found in ball and box with ``argmax model(x_adv[n]) !=
    y[n]``, or ``x[n]`` where none is found.

    Composition and settings are the published ones; the attacks are :func:`apgd`, :func:`square`
    and a FAB of this package. In version ``"rand"``, the mean logits of 20 forwards say whether an
    image is fooled, where the published code takes the first lucky forward. With fewer than ten
    classes, every other class is the target once. The random numbers of a sample depend neither on
    the other samples nor on which of them were fooled; only a stochastic network's own draws depend
    on the batch, even with ``SampleSeeds``.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`; where nothing fooled
    the network, the result is ``x``. Square needs images [N, C, H, W].

    Args:
        version: ``"standard"`` (APGD-CE, targeted APGD, targeted FAB, Square), ``"plus"`` (APGD-CE,
            APGD-DLR, FAB, Square, both targeted ones; 5 restarts) or ``"rand"`` (APGD-CE and
            APGD-DLR over 20 forwards, for stochastic networks).
        attacks: Names of the attacks to run instead of the version's, with the version's settings:
            ``"apgd-ce"``, ``"apgd-dlr"``, ``"apgd-t"``, ``"fab"``, ``"fab-t"``, ``"square"``.

    Warns:
        AutoAttackWarning: If a stochastic network is attacked without version ``"rand"``, the model
            returns probabilities instead of logits, images have no gradient, attacks are skipped
            because there are too few classes, or Square is stronger than the attacks before it.

    Source: Croce and Hein (ICML 2020); FAB: Croce and Hein (ICML 2020); Square: Andriushchenko et
        al. (ECCV 2020).

    Examples:
        >>> from sj_robust.attacks import autoattack
        >>> model = lambda x: x.flatten(1) @ torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> x, y = torch.tensor([[0.55, 0.45], [0.9, 0.1]]), torch.tensor([0, 0])
        >>> model(autoattack(model, x, y, eps=0.1, attacks=["apgd-ce"])).argmax(1)
        tensor([1, 0])
    """
    ball = ball_threat(norm, eps)
    settings = _checked_version(version)
    names = settings.attacks if attacks is None else _checked_names(attacks)
    x, y = checked_copies(model, x, y, generator)
    if "square" in names:
        check_square(x)
    if x.numel() == 0 or ball.eps == 0:
        return x
    with isolated(model, x, generator) as private:
        judged = averaged(model, settings.eot_samples)
        logits = clean_logits(judged, x, y)
        standing = logits.argmax(1) == y
        if not bool(standing.any()):
            return x
        classes = logits.shape[1]
        left_out = [name for name in names if classes < _FEWEST.get(name, 2)]
        messages = []
        for name in left_out:
            needed = f"it needs at least {_FEWEST[name]} classes, the model has {classes}"
            messages.append(f"{name} is skipped: {needed}")
        names = _without(names, left_out, classes)
        messages += _doubts(model, x[standing], y[standing], names, settings)
        seeds = seeds_of_samples(private, len(x), draw_seed(private))
        x_adv = x.clone()
        for name, attack in _members(names, ball, settings).items():
            rows = standing.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            own = seeds.rows(rows).derived(name)
            found = attack(model, x[rows], y[rows], generator=own)
            logits = clean_logits(judged, found, y[rows])
            fooled = logits.argmax(1) != y[rows]
            x_adv[rows[fooled]] = found[fooled]
            standing[rows[fooled]] = False
            share = float(fooled.double().sum()) / len(x)
            if name == "square" and name != names[0] and share > _SQUARE_ALONE:
                messages.append(
                    f"Square fooled {share:.2%} of the images that were still correct after the "
                    "attacks before it, so their gradients may be masked; use more queries, or try "
                    "other surrogate gradients"
                )
    for message in messages:
        warnings.warn(f"AutoAttack: {message}", AutoAttackWarning, stacklevel=2)
    return x_adv


def _members(
    names: Sequence[str],
    ball: ThreatModel,
    settings: _Version,
) -> dict[str, Attack]:
    """The attacks by their names, with AutoAttack's settings."""
    restarts = settings.restarts
    ascent = partial(
        apgd,
        eps=ball.eps,
        norm=ball.ball,
        steps=_ITERATIONS,
        eot_samples=settings.eot_samples,
        keep_best=settings.eot_samples == 1,
    )
    boundary = partial(fab, eps=ball.eps, norm=ball.ball, steps=_ITERATIONS)
    members: dict[str, Attack] = {
        "apgd-ce": partial(ascent, loss="ce", restarts=restarts),
        "apgd-dlr": partial(ascent, loss="dlr", restarts=restarts),
        "apgd-t": partial(ascent, loss="dlr_targeted", target_classes=_TARGETS),
        "fab": partial(boundary, restarts=restarts),
        "fab-t": partial(boundary, target_classes=_TARGETS),
        "square": partial(
            square,
            eps=ball.eps,
            norm=ball.ball,
            queries=_QUERIES,
            eot_samples=settings.eot_samples,
        ),
    }
    return {name: members[name] for name in names}


def _checked_version(version: str) -> _Version:
    if version not in _VERSIONS:
        raise ValueError(
            f"version must be one of {tuple(_VERSIONS)}, got {version!r}; or pass your own list "
            "as attacks"
        )
    return _VERSIONS[version]


def _checked_names(attacks: Sequence[str]) -> tuple[str, ...]:
    known = _VERSIONS["plus"].attacks  # runs all of them
    if isinstance(attacks, str) or not attacks:
        raise ValueError(f"attacks must be a list of names, got {attacks!r}; choose from {known}")
    if not set(attacks) <= set(known) or len(set(attacks)) < len(attacks):
        raise ValueError(f"attacks must be different names out of {known}, got {tuple(attacks)}")
    return tuple(attacks)


def _without(
    names: tuple[str, ...],
    left_out: list[str],
    classes: int,
) -> tuple[str, ...]:
    """The attacks that the number of classes allows."""
    kept = tuple(name for name in names if name not in left_out)
    if not kept:
        raise ValueError(
            f"none of the attacks {names} can attack {classes} classes; add 'apgd-ce' or 'fab'"
        )
    return kept


def _doubts(
    model: Model, x: Tensor, y: Tensor, names: tuple[str, ...], settings: _Version
) -> Iterator[str]:
    """What makes the result unreliable, seen at some images that are classified correctly."""
    x = x[:_CHECKED_IMAGES]
    y = y[:_CHECKED_IMAGES]
    with torch.no_grad():
        answers = [model(x).double() for _ in range(_CHECKED_FORWARDS)]
    first = answers[0]
    if settings.eot_samples == 1 and any(differ(first, other) for other in answers[1:]):
        yield (
            "the network gives different logits for the same images, so it is stochastic; "
            "use version='rand'"
        )
    if _are_probabilities(first):
        yield (
            "the network returns probabilities, whose gradients vanish; return logits, without a "
            "softmax"
        )
    if names == ("square",):
        return
    gradient, _ = Objective(model).gradient(x, y)
    without = int((gradient == 0).flatten(1).all(1).sum())
    if without:
        yield (
            f"{without} of {len(x)} images have a gradient of zero, which gradient attacks cannot "
            "follow; try other surrogate gradients"
        )


def _are_probabilities(logits: Tensor) -> bool:
    inside = (logits > -1e-5) & (logits < 1 + 1e-5)
    sums_to_one = (logits.sum(1) - 1).abs() < 1e-3
    return bool(inside.all() & sums_to_one.all())
