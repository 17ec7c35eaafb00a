"""AutoAttack of pyautoattack, Square, any attack object of another package, attacks crafted
elsewhere.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sj_robust.attacks._autoattack import (
    ATTACKS,
    VERSIONS,
    AutoAttackWarning,
    Settings,
    library,
    run_attacks,
    search_squares,
)
from sj_robust.attacks.call import Attack, Model, Randomness, checked_copies, crafting
from sj_robust.attacks.projection import Norm
from sj_robust.attacks.threat import ThreatModel, ball_threat, rounding
from sj_robust.core.checks import check_count, check_model
from sj_robust.core.randomness import Private, draw_seed

__all__ = ["AutoAttackWarning", "autoattack", "external", "square", "transfer"]


def autoattack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "Linf",
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    generator: Randomness = None,
) -> Tensor:
    """AutoAttack: APGD, FAB and Square one after the other on the images that none has fooled yet.

    AutoAttack 集成攻击。

    Equation: ``x_adv[n]`` is the first image found in ball and box with ``argmax model(x_adv[n]) !=
    y[n]``, or ``x[n]`` where none is found.

    The single attacks are those of pyautoattack, with its settings; what they claim is judged here,
    on the images that are returned. Square gets logits without ties. With fewer than ten classes
    every other class is a target once. With ``SampleSeeds`` starts and squares are drawn per
    sample; then only a stochastic network's own draws depend on the batch. With a
    ``torch.Generator`` the draws are the library's: starts depend on which samples are left, all
    samples of a call share the position and colour of Square's squares.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`; where nothing fooled
    the network, the result is ``x``. Square needs images [N, C, H, W]. All is computed in float32
    except in the network.

    Args:
        version: ``"standard"`` (APGD-CE, targeted APGD, targeted FAB, Square), ``"plus"`` (APGD-CE,
            APGD-DLR, FAB, Square, both targeted ones; 5 restarts) or ``"rand"`` (APGD-CE and
            APGD-DLR over 20 forwards, for stochastic networks).
        attacks: Names to run in place of the version's, with the version's settings: ``"apgd-ce"``,
            ``"apgd-dlr"``, ``"apgd-t"``, ``"fab"``, ``"fab-t"``, ``"square"``.

    Raises:
        ModuleNotFoundError: If pyautoattack is not installed.

    Warns:
        AutoAttackWarning: What the library's checks find: a stochastic network, probabilities in
            place of logits, a network that computes gradients itself, zero gradients, Square
            stronger than the attacks before it.

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
    settings = _settings(version, attacks)
    library()
    x, y = checked_copies(model, x, y, generator)
    if "square" in settings.attacks:
        _check_square(x)
    if x.numel() == 0 or ball.eps == 0:
        return x
    with _isolated(model, x, generator) as private:
        x_adv, messages = run_attacks(model, x, y, ball=ball, settings=settings, private=private)
    for message in messages:
        warnings.warn(f"AutoAttack: {message}", AutoAttackWarning, stacklevel=2)
    return x_adv


def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "Linf",
    queries: int = 5000,
    generator: Randomness = None,
) -> Tensor:
    """Square Attack: random search over squares that asks for logits and for no gradient.

    Square 黑盒攻击。

    Equation: a square of random place and colour is kept if it lowers the margin ``z_y - max_{k !=
    y} z_k``, until ``argmax z != y``.

    The search has AutoAttack's settings and a square per sample, so that neighbours and batch size
    do not matter. It needs no other package. It judges logits whose ties are broken: a margin of 0
    is no success, and spike counts tie.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`, with images [N, C, H,
    W]. Where nothing fooled the network the result is the image of the smallest margin, and ``x``
    where it was wrong already.

    Args:
        queries: Squares tried per image after the start, >= 1.

    Source: Andriushchenko et al. (ECCV 2020); its settings in AutoAttack, Croce and Hein (ICML
        2020).

    Examples:
        >>> from sj_robust.attacks import square
        >>> model = lambda x: torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)
        >>> x, y = torch.full((1, 1, 4, 4), 0.45), torch.tensor([1])
        >>> model(square(model, x, y, eps=0.2, queries=200)).argmax(1)
        tensor([0])
    """
    ball = ball_threat(norm, eps)
    check_count("queries", queries)
    x, y = checked_copies(model, x, y, generator)
    _check_square(x)
    if x.numel() == 0 or ball.eps == 0:
        return x
    with _isolated(model, x, generator) as private:
        return search_squares(model, x, y, ball=ball, queries=queries, private=private)


def external(
    attack: Callable[[Tensor, Tensor], Tensor], *, eps: float, norm: Norm = "Linf"
) -> Attack:
    """Attack of another package, built for the model and called as ``attack(x, y)``, as one of this
    package.

    其他工具包的攻击。

    What it returns is checked, then projected exactly. Around the call the global generators of
    torch, numpy and Python are seeded and restored; the model is in evaluation mode and gets modes,
    ``.grad`` and ``requires_grad`` back.

    Args:
        attack: A torchattacks object, ``lambda x, y: foolbox_attack(foolbox_model, x, y,
            epsilons=eps)[1]``, or any function of images and labels. It attacks the model that it
            was built for, whatever it is given.
        eps: Radius it was built with, in units of [0, 1] images.
        norm: ``"Linf"`` or ``"L2"``.

    Returns:
        ``attack(model, x, y, *, generator=None)``. Its randomness as a whole is seeded by
        ``generator``: with ``SampleSeeds`` it is repeatable, but what the other package draws
            depends on the batch. The call raises
        ``TypeError`` or ``ValueError`` if the result is no tensor like ``x``, is not finite, or
        leaves the ball or [0, 1] by more than rounding.

    Raises:
        TypeError: If ``attack`` cannot be called.
        ValueError: If ``eps`` or ``norm`` do not fit.

    Source: the interface of torchattacks (Kim, 2020).

    Examples:
        >>> from sj_robust.attacks import external
        >>> model = torch.nn.Linear(4, 3)
        >>> brighter = external(lambda x, y: (x + 0.1).clamp(0, 1), eps=0.1)
        >>> brighter(model, torch.full((1, 4), 0.5), torch.tensor([0]))
        tensor([[0.6000, 0.6000, 0.6000, 0.6000]])
    """
    if not callable(attack):
        raise TypeError(
            f"attack must be called as attack(x, y), got {type(attack).__name__}; wrap it in a "
            "function"
        )
    return _External(attack, ball_threat(norm, eps))


def transfer(source: Model, attack: Attack) -> Attack:
    """Attack that crafts on ``source``, whatever model it is called with.

    迁移攻击。

    Equation: ``transfer(s, a)(model, x, y) = a(s, x, y)``; the model itself is never asked.

    Args:
        source: The network to craft on, such as another checkpoint.
        attack: Attack with its budget bound, such as ``functools.partial(pgd, eps=0.1,
            step_size=0.02, steps=10)``.

    Returns:
        ``attack(model, x, y, *, generator=None)``.

    Raises:
        TypeError: If an argument cannot be called.

    Source: transfer evaluation of Ding et al. (ICML 2024), section 5.

    Examples:
        >>> from functools import partial
        >>> from sj_robust.attacks import fgsm, transfer
        >>> source, target = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> x, y = torch.rand(2, 4), torch.tensor([0, 1])
        >>> moved = transfer(source, partial(fgsm, eps=0.1))(target, x, y)
        >>> torch.equal(moved, fgsm(source, x, y, eps=0.1))
        True
    """
    if not callable(source):
        raise TypeError(
            f"source must be a callable from images to logits, got {type(source).__name__}"
        )
    if not callable(attack):
        raise TypeError(
            f"attack must be a callable, got {type(attack).__name__}; use functools.partial(pgd, "
            "eps=...)"
        )
    return _Transfer(source, attack)


@dataclass(frozen=True)
class _Transfer:
    """What :func:`transfer` returns; a class, so that it has a repr and can be pickled."""

    source: Model
    attack: Attack

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, generator: Randomness = None
    ) -> Tensor:
        check_model(model)
        return self.attack(self.source, x, y, generator=generator)


@dataclass(frozen=True)
class _External:
    """What :func:`external` returns."""

    attack: Callable[[Tensor, Tensor], Tensor]
    ball: ThreatModel

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, generator: Randomness = None
    ) -> Tensor:
        x, y = checked_copies(model, x, y, generator)
        if x.numel() == 0:
            return x
        with _isolated(model, x, generator):
            found = self.attack(x.clone(), y.clone())
        with torch.no_grad(), torch.inference_mode(False):
            return self.ball.project(x, _checked(found, x, self.ball))


def _checked(found: Any, x: Tensor, ball: ThreatModel) -> Tensor:
    """What another package returned, if it is images in the ball as far as rounding allows."""
    if not isinstance(found, Tensor):
        raise TypeError(
            f"attack(x, y) must return a tensor, got {type(found).__name__}; "
            "wrap it in a function that returns the images alone"
        )
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(x, what), getattr(found, what)
        if expected != got:
            raise ValueError(
                f"attack(x, y) must return images of {what} {_plain(expected)} as x has, got "
                f"{_plain(got)}; convert them in a wrapper"
            )
    images: Tensor = found.detach().clone()
    finite = torch.isfinite(images)
    if not bool(finite.all()):
        raise ValueError(
            f"attack(x, y) must return finite images, got {int((~finite).sum())} NaN or infinite "
            f"values in {int((~finite).flatten(1).any(1).sum())} of {len(x)} images; craft in "
            "float32"
        )
    low, high = (float(bound) for bound in torch.aminmax(images))
    if low < -rounding(x) or high > 1 + rounding(x):
        raise ValueError(
            f"attack(x, y) must return images in [0, 1], got values from {low:.6g} to {high:.6g}; "
            "give it the bounds (0, 1) and normalise inside the model"
        )
    outside = int((~ball.contains(x, images)).sum())
    if outside:
        farthest = float(ball.distance(x, images).max())
        raise ValueError(
            f"attack(x, y) must stay within {ball.norm} distance eps={ball.eps:.6g} of x, got "
            f"{farthest:.6g}, {farthest - ball.eps:.3g} too far ({outside} of {len(x)} images); "
            "build it with this eps and norm"
        )
    return images


@contextmanager
def _isolated(model: Model, x: Tensor, generator: Randomness) -> Iterator[Private]:
    """As ``crafting``; foreign code inside also leaves all other global generators, ``.grad`` and
    flags alone.
    """
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    kept = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    # what other packages draw from
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    # torch's own
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if initialized else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            crafting(model, x.device, generator) as private,
        ):
            seed = draw_seed(private)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002  as above
            for parameter in parameters:
                parameter.grad = None
            yield private
    finally:
        for parameter, grad, requires_grad in kept:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002  as above


def _settings(version: str, attacks: Sequence[str] | None) -> Settings:
    """Settings of a version, with other attacks if given."""
    if version not in VERSIONS:
        raise ValueError(
            f"version must be one of {tuple(VERSIONS)}, got {version!r}; pass attacks for a list "
            "of yours"
        )
    if attacks is None:
        return VERSIONS[version]
    if isinstance(attacks, str) or not attacks:
        raise ValueError(f"attacks must be a list of names, got {attacks!r}; choose from {ATTACKS}")
    unknown = [name for name in attacks if name not in ATTACKS]
    if unknown or len(set(attacks)) < len(attacks):
        raise ValueError(f"attacks must be different names out of {ATTACKS}, got {tuple(attacks)}")
    return replace(VERSIONS[version], attacks=tuple(attacks))


def _check_square(x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(
            f"Square needs images [N, C, H, W], got shape {tuple(x.shape)}; reshape inside the "
            "model, or name attacks without 'square' in `attacks`"
        )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value
