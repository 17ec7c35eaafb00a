"""Attacks of other packages, AutoAttack among them, and attacks crafted on another network."""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sj_robust.attacks.apgd import LEAST_CLASSES
from sj_robust.attacks.call import Attack, Model, Randomness, checked_copies, isolated
from sj_robust.attacks.logits import clean_logits
from sj_robust.attacks.square import check_square
from sj_robust.core.checks import check_choice, check_model
from sj_robust.core.extras import check_extra
from sj_robust.core.randomness import draw_seed
from sj_robust.core.threat import Threat, ThreatModel, as_threat, rounding

__all__ = ["autoattack", "external", "transfer"]

Version = Literal["standard", "plus", "rand"]
Part = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]
"""An attack within AutoAttack."""
_FEWEST = {"apgd-dlr": LEAST_CLASSES["dlr"], "apgd-t": LEAST_CLASSES["dlr_targeted"]}
"""Classes that an attack needs, where two are too few."""
_TARGETS = 9


def autoattack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
    version: Version = "standard",
    attacks: Sequence[Part] | None = None,
    generator: Randomness = None,
) -> Tensor:
    """AutoAttack as pyautoattack runs it: several attacks, one after the other, on the images that
    are still correct.

    AutoAttack 集成攻击（调用 pyautoattack）。

    Equation: ``x_adv[n]`` is the first image found in ball and box with ``argmax model(x_adv[n]) !=
    y[n]``, or ``x[n]`` where none is found.

    pyautoattack computes in float32 and gives the network images of the dtype of ``x``. With fewer
    than ten classes, every other class is a target once. Random numbers are those of the batch,
    also with ``SampleSeeds``. What its checks find goes to the logger ``auto-attack``. The result
    is checked and projected as that of :func:`external`.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`. Square needs images
    [N, C, H, W].

    Args:
        version: ``"standard"`` (APGD-CE, targeted APGD, targeted FAB, Square), ``"plus"`` (APGD-CE,
            APGD-DLR, FAB, Square, both targeted ones; 5 restarts) or ``"rand"`` (APGD-CE and
            APGD-DLR over 20 forwards, for stochastic networks).
        attacks: Names of the attacks to run instead of the version's, with the version's settings:
            ``"apgd-ce"``, ``"apgd-dlr"``, ``"apgd-t"``, ``"fab"``, ``"fab-t"``, ``"square"``.

    Raises:
        ModuleNotFoundError: If pyautoattack is not installed (extra ``attacks``).

    Warns:
        UserWarning: If attacks are left out because there are too few classes.

    Source: Croce and Hein (ICML 2020); FAB: Croce and Hein (ICML 2020); Square: Andriushchenko et
        al. (ECCV 2020); pyautoattack 0.2.

    Examples:
        >>> from sj_robust.attacks import autoattack
        >>> model = lambda x: x.flatten(1) @ torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> x, y = torch.tensor([[0.55, 0.45], [0.9, 0.1]]), torch.tensor([0, 0])
        >>> model(autoattack(model, x, y, eps=0.1, attacks=["apgd-ce"])).argmax(1)
        tensor([1, 0])
    """
    check_extra("autoattack")
    from pyautoattack import AutoAttack

    ball = as_threat(eps, "Linf", "L2")
    check_choice("version", version, get_args(Version))
    for name in attacks or ():
        check_choice("attacks", name, get_args(Part))
    x, y = checked_copies(model, x, y, generator)
    tracer = sys.gettrace()

    def of_its_dtype(images: Tensor) -> Tensor:
        return model(images.to(x.dtype)).float()

    library = AutoAttack(
        of_its_dtype, norm=ball.norm, eps=ball.eps, version=version, device=x.device, seed=0
    )
    if attacks is not None:
        library.attacks_to_run = list(attacks)
    if "square" in library.attacks_to_run:
        check_square(x)
    if x.numel() == 0 or ball.eps == 0:
        return x
    try:
        with isolated(model, x, generator) as private:
            library.seed = draw_seed(private)
            _fit_to_classes(library, clean_logits(model, x, y).shape[1])
            images = x.float().contiguous()  # it views them in this order
            found, _ = library.run_standard_evaluation(images, y.clone(), batch_size=len(x))
    finally:
        sys.settrace(tracer)  # one of its checks takes it away
    with torch.no_grad(), torch.inference_mode(False):
        return ball.project(x, _checked(found.to(x.dtype), x, ball))


def _fit_to_classes(library: Any, classes: int) -> None:
    """Leave out what needs more classes, and take no class as a target twice."""
    names = library.attacks_to_run
    library.attacks_to_run = [name for name in names if classes >= _FEWEST.get(name, 2)]
    left_out = [name for name in names if name not in library.attacks_to_run]
    if left_out:
        warnings.warn(
            f"AutoAttack: {', '.join(left_out)} needs more classes than the {classes} of the model "
            "and is left out",
            stacklevel=3,
        )
    library.apgd_targeted.n_target_classes = min(_TARGETS, classes - 1)
    library.fab.n_target_classes = min(_TARGETS, classes - 1)


def external(attack: Callable[[Tensor, Tensor], Tensor], *, eps: Threat) -> Attack:
    """Turn an attack of another package, called as ``attack(x, y)``, into one of this package.

    其他工具包的攻击。

    The returned images are checked and then projected exactly. For the call, the global generators
    of torch, numpy and Python are seeded and the model is set to evaluation mode; afterwards the
    generators, the model's modes, ``.grad`` and ``requires_grad`` are restored.

    Args:
        attack: A torchattacks object, a lambda around an attack of Foolbox, or any function of
            images and labels. It attacks the model that it was built for, whichever model is
            passed.
        eps: What it was built with, a Linf radius or ``ThreatModel("L2", ...)``.

    Returns:
        ``attack(model, x, y, *, generator=None)``. ``generator`` seeds all of its randomness: with
        ``SampleSeeds`` it is repeatable, but the random numbers of the other package depend on the
        batch. The call raises ``TypeError`` or ``ValueError`` if the result is not a tensor like
        ``x``, is not finite, or leaves the ball or [0, 1] by more than rounding.

    Raises:
        TypeError: If ``attack`` cannot be called.
        ValueError: If ``eps`` does not fit.

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
    return _External(attack, as_threat(eps, "Linf", "L2"))


def transfer(source: Model, attack: Attack) -> Attack:
    """An attack that crafts its images on ``source``, whichever model it is called with.

    迁移攻击。

    Equation: ``transfer(s, a)(model, x, y) = a(s, x, y)``; the model itself is never called.

    Args:
        source: The network on which images are crafted, such as another checkpoint.
        attack: An attack with its budget set, such as ``functools.partial(pgd, eps=0.1,
            step_size=0.02, steps=10, keep_best=False)``. It should not stop where it fools
            ``source``, since few images fool another network there, and what ``source`` already
            gets wrong would be returned unchanged: pass ``keep_best=False`` to :func:`pgd`,
            :func:`apgd` and :func:`sapgd`, and a large ``confidence`` to attacks on events.

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
        with isolated(model, x, generator):
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
            "build it with this radius"
        )
    return images


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value
