"""Training modes: how each makes its perturbed images, and its published options."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sj_robust.attacks import (
    Attack,
    ThreatModel,
    fgsm,
    flip_events,
    gaussian,
    move_events,
    pgd,
    random_flips,
    random_moves,
    rfgsm,
)
from sj_robust.attacks.call import Model, checked_copies, crafting
from sj_robust.attacks.call import Objective as AttackObjective
from sj_robust.core.checks import check_count, check_logits, check_size
from sj_robust.core.randomness import SampleSeeds, randn
from sj_robust.core.threat import Threat, as_threat, linf_bounds
from sj_robust.training.objective import LossName
from sj_robust.training.plan import SelectName

__all__ = [
    "MODES",
    "Mode",
    "ModeName",
    "event_attacks",
    "final_attacks",
    "trades",
    "training_attack",
    "validation_attacks",
]

ModeName = Literal["none", "gaussian", "at", "rat", "pgd_at", "trades", "certified"]


@dataclass(frozen=True)
class Mode:
    """Default options of a training mode, as published. 训练模式的默认选项。

    Attributes:
        name: Name of the mode.
        attack_steps: Gradient steps that make a perturbed image; 0 for noise or without perturbed
            images.
        loss: Loss of :class:`Objective`.
        kappa: Weight of the clean cross entropy, at the end of the training for ``certified``.
        rho: Weight of MS-MPPD.
        weight_decay: Weight decay of the optimizer.
        retraction: Length beta of the step towards orthonormal rows after the optimizer's; 0 for
            none.
        select: Validation accuracy that selects the best epoch.
        idle: Options of ``recipes/adv_train.py`` that have no effect in this mode.

    Source: Ding et al. (ICML 2024; NeurIPS 2022 for ``rat``), Madry et al. (ICLR 2018), Zhang et
        al. (ICML 2019), Gowal et al. (arXiv 1810.12715) for ``certified``.

    Examples:
        >>> MODES["rat"].weight_decay, MODES["pgd_at"].kappa
        (0.0, 0.0)
    """

    name: ModeName
    attack_steps: int = 0
    loss: LossName = "paper"
    kappa: float = 0.5
    rho: float = 0.0
    weight_decay: float = 5e-4
    retraction: float = 0.0
    select: SelectName = "pgd"
    idle: tuple[str, ...] = ()

    @property
    def single_step(self) -> bool:
        """Whether the training images are made by a single gradient step, so that catastrophic
        overfitting is checked for.
        """
        return self.attack_steps == 1 and self.loss != "certified"


NOISE = "gaussian"
"""The attack of the final report that has no budget."""

_OF_BOUNDS = (
    "certified_eps",
    "certified_flips",
    "bounds",
    "surrogate_width",
    "ramp",
    "box",
    "attacked",
)
"""Options of the mode certified alone."""

_OF_CRAFTING = (
    "step_size",
    "attack_steps",
    "noise_std",
    "project",
    "beta",
    "trades_weight",
    *_OF_BOUNDS,
)
"""Options that have no meaning where the images to learn are not made with gradients."""

_MODES = (
    Mode(
        "none",
        select="clean",
        idle=("rho", "kappa", "layers", "norm", "indicator", "input_gain", *_OF_CRAFTING),
    ),
    Mode("gaussian", rho=1.0, idle=_OF_CRAFTING),
    Mode(
        "at",
        attack_steps=1,
        rho=1.0,
        idle=("attack_steps", "beta", "trades_weight", *_OF_BOUNDS),
    ),
    Mode(
        "rat",
        attack_steps=1,
        rho=1.0,
        weight_decay=0.0,
        retraction=1e-3,
        idle=("attack_steps", "trades_weight", *_OF_BOUNDS),
    ),
    Mode(
        "pgd_at",
        attack_steps=7,
        kappa=0.0,
        idle=("noise_std", "project", "beta", "trades_weight", *_OF_BOUNDS),
    ),
    Mode("trades", attack_steps=10, loss="trades", idle=("kappa", "project", "beta", *_OF_BOUNDS)),
    Mode(
        "certified",
        attack_steps=1,
        loss="certified",
        kappa=0.0,
        weight_decay=0.0,
        select="verified",
        idle=("attack_steps", "beta", "trades_weight"),
    ),
)
MODES: Mapping[ModeName, Mode] = MappingProxyType({mode.name: mode for mode in _MODES})
"""Every training mode by its name."""


def training_attack(
    mode: ModeName,
    *,
    eps: float,
    step_size: float | None = None,
    noise_std: float = 0.001,
    project: bool = True,
    steps: int | None = None,
) -> Attack | None:
    """The attack that makes the perturbed images of a training batch in a mode.
    各训练模式的扰动生成方式。

    - ``"none"``: no perturbed images.
    - ``"gaussian"``: ``x + eps * n`` with ``n ~ N(0, 1)``, not clamped.
    - ``"at"``, ``"rat"``: :func:`sj_robust.attacks.rfgsm`, one step from ``x + noise_std * n``;
      also for ``"certified"``, for terms in addition to its bounds.
    - ``"pgd_at"``: the last iterate of :func:`sj_robust.attacks.pgd` on the cross entropy, from a
      uniform start.
    - ``"trades"``: :func:`trades`, from ``x + noise_std * n``.

    Every attack runs the network in evaluation mode and accepts a ``torch.Generator`` or
    ``SampleSeeds``.

    Args:
        mode: A name of :data:`MODES`.
        eps: Linf radius in units of [0, 1] images; the standard deviation for ``"gaussian"``.
        step_size: Length of a step; None is ``eps`` for one step and ``eps / 4`` for several.
        noise_std: Standard deviation of the initial noise of ``"at"``, ``"rat"`` and ``"trades"``.
        project: Whether the step of ``"at"`` and ``"rat"`` is projected onto the ball; the
            published code does not project.
        steps: Gradient steps of ``"pgd_at"`` and ``"trades"``; None means 7 and 10.

    Returns:
        ``attack(model, x, y, *, generator)``, or None for ``"none"``.

    Raises:
        ValueError: If the mode is unknown, or an option does not apply to it.

    Source: Ding et al. (ICML 2024), section 4; Madry et al. (ICLR 2018), CIFAR-10: 7 steps of eps /
        4; Zhang et al. (ICML 2019): 10 steps.

    Examples:
        >>> attack = training_attack("pgd_at", eps=8 / 255)
        >>> x, y = torch.rand(2, 8), torch.tensor([0, 1])
        >>> x_perturbed = attack(torch.nn.Linear(8, 3), x, y, generator=SampleSeeds([1, 2]))
        >>> bool((x_perturbed - x).abs().max() <= 8 / 255)
        True
    """
    if mode not in get_args(ModeName):
        raise ValueError(f"mode must be one of {', '.join(get_args(ModeName))}, got {mode!r}")
    several = MODES[mode].attack_steps > 1
    if several and not project:
        raise ValueError(
            f"project=False belongs to modes at and rat; {mode} projects every step, omit it"
        )
    if steps is not None and not several:
        raise ValueError(
            f"steps belongs to modes pgd_at and trades, got steps={steps} for {mode}; omit it"
        )
    if mode == "none":
        return None
    if mode == "gaussian":
        return partial(gaussian, std=eps, clamp=False)
    if not several:
        return partial(rfgsm, eps=eps, step_size=step_size, noise_std=noise_std, project=project)
    step_size = eps / 4 if step_size is None else step_size
    steps = MODES[mode].attack_steps if steps is None else steps
    if mode == "pgd_at":
        return partial(pgd, eps=eps, step_size=step_size, steps=steps, keep_best=False)
    return partial(trades, eps=eps, step_size=step_size, steps=steps, noise_std=noise_std)


def validation_attacks(eps: float) -> dict[str, Attack]:
    """Attacks after every epoch: PGD with 7 steps selects the network, and FGSM shows catastrophic
    overfitting. 验证时的攻击。

    Args:
        eps: Linf radius in units of [0, 1] images.

    Returns:
        ``"fgsm"``, and ``"pgd"`` with step size eps / 3.

    Source: selection by validation accuracy under attack, instead of test accuracy.

    Examples:
        >>> list(validation_attacks(8 / 255))
        ['fgsm', 'pgd']
    """
    return {
        "fgsm": partial(fgsm, eps=eps),
        "pgd": partial(pgd, eps=eps, step_size=eps / 3, steps=7),
    }


def final_attacks(eps: float) -> dict[str, Attack]:
    """Attacks of the table at the end of a training. 训练结束后报告的攻击。

    Args:
        eps: Linf radius in units of [0, 1] images, and the standard deviation of the noise.

    Returns:
        ``"gaussian"``, ``"fgsm"``, and ``"pgd20"`` with steps of eps / 8.

    Source: attacks of Ding et al. (ICML 2024), section 5, in the same proportions.

    Examples:
        >>> list(final_attacks(8 / 255))
        ['gaussian', 'fgsm', 'pgd20']
    """
    pgd20 = partial(pgd, eps=eps, step_size=eps / 8, steps=20)
    return {NOISE: partial(gaussian, std=eps), "fgsm": partial(fgsm, eps=eps), "pgd20": pgd20}


def event_training_attack(
    mode: Literal["at", "rat", "pgd_at"], threat: ThreatModel, *, steps: int | None = None
) -> Attack:
    """How a mode makes the perturbed event frames of a training batch, by changes or moves of a
    threat. 事件帧的训练攻击。

    ``"at"`` and ``"rat"`` spend the whole budget along one gradient, ``"pgd_at"`` in ``steps``
    parts, 7 by default; a sample that the network gets wrong already stays as it is.

    Source: :func:`sj_robust.attacks.flip_events` and :func:`sj_robust.attacks.move_events` without
        probes and queries.

    Examples:
        >>> attack = event_training_attack("at", ThreatModel("L0", 3))
        >>> x, model = torch.zeros(2, 1, 2, 2, 2), torch.nn.Sequential(torch.nn.Flatten())
        >>> attack(model, x, torch.tensor([0, 1]), generator=SampleSeeds([1, 2])).sum().item() <= 6
        True
    """
    of_mode = MODES[mode].attack_steps
    spent = {"steps": of_mode if steps is None else steps, "keep_best": False}
    return partial(_guided(threat), **_BY_GRADIENT_ALONE, **spent)


_BY_GRADIENT_ALONE: dict[str, Any] = {"probes": 0, "queries": 0, "reduce": False}


def _guided(threat: ThreatModel) -> "partial[Tensor]":
    """The attack by gradient of a threat of events, its budget bound."""
    return partial(flip_events if threat.norm == "L0" else move_events, eps=threat)


def event_attacks(eps: Threat, *, final: bool) -> dict[str, Attack]:
    """Attacks on event frames for validation and for the final test.
    事件帧训练的验证与最终攻击。

    Args:
        eps: Number of changed events per sample, or a threat of changed or of moved events.
        final: Whether to return the slower attacks of the final test.

    Returns:
        ``"flips"`` or ``"moves"``, by gradient. For the final test, it also uses probes and
        queries, and there is ``"random"``, the best of 20 random sets of removed or moved events.

    Source: see :func:`sj_robust.attacks.flip_events` and :func:`sj_robust.attacks.move_events`.

    Examples:
        >>> list(event_attacks(ThreatModel("moves", 10, largest_shift=1), final=True))
        ['moves', 'random']
    """
    search: dict[str, Any] = {"reduce": False} if final else {"steps": 5, **_BY_GRADIENT_ALONE}
    threat = as_threat(eps, "L0", "moves")
    name = "moves" if threat.norm == "moves" else "flips"
    guided = partial(_guided(threat), **search)
    if not final:
        return {name: guided}
    if threat.norm == "moves":
        return {name: guided, "random": partial(random_moves, eps=threat, tries=20)}
    return {name: guided, "random": partial(random_flips, eps=threat, allow="remove", tries=20)}


def trades(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int = 10,
    noise_std: float = 0.001,
    generator: torch.Generator | SampleSeeds | None = None,
) -> Tensor:
    """Inner maximisation of TRADES: away from the clean prediction, whatever the label is. TRADES
    的内层最大化。

    Equation, with p(x) the softmax of the logits and ``n ~ N(0, 1)``::

        x[0] = x + noise_std * n
        x[k+1] = clamp(x[k] + step_size * sign(grad_x[k] KL(p(x) || p(x[k]))), max(x - eps, 0),
        min(x + eps, 1))

    Where p(x[k]) = p(x) the divergence has no gradient. A spiking network answers in steps, so if
    the noise flips no spike of an image, the sign of rounding errors decides the first step there;
    a larger ``noise_std`` avoids it.

    Args:
        model: Images [N, ...] to logits [N, classes]; it sees x[0], which may leave [0, 1] by the
            noise.
        x: Images in [0, 1], floating point.
        y: Labels [N] int64, not used by the attack.
        eps: Linf radius in units of [0, 1] images; never exceeded, see ``linf_bounds``.
        step_size: Length of a step.
        steps: Number of gradient steps, >= 1.
        noise_std: Standard deviation of the noise at the start, > 0.
        generator: Seeds the noise; None draws fresh numbers, global generators untouched.

    Returns:
        The last iterate, in shape, dtype and device of ``x``; errors are those of
        :mod:`sj_robust.attacks`.

    Source: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy" (ICML
        2019).

    Examples:
        >>> weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
        >>> x, y = torch.full((1, 2), 0.5), torch.tensor([1])
        >>> x_perturbed = trades(lambda x: x @ weight.T, x, y, eps=0.25, step_size=0.25)
        >>> (x_perturbed - x).abs()
        tensor([[0.2500, 0.2500]])
    """
    eps = check_size("eps", eps, at_most=1.0)
    step_size = check_size("step_size", step_size, positive=eps > 0)
    noise_std = check_size("noise_std", noise_std, at_most=1.0, positive=True)
    check_count("steps", steps)
    x, y = checked_copies(model, x, y, generator)
    if x.numel() == 0:
        return x
    with crafting(model, x.device, generator) as private:
        with torch.no_grad():
            clean = check_logits(model(x), y).log_softmax(1)

        def divergence(logits: Tensor, y: Tensor) -> Tensor:
            return F.kl_div(logits.log_softmax(1), clean, reduction="none", log_target=True).sum(1)

        objective = AttackObjective(model, divergence)
        lower, upper = linf_bounds(x, eps=eps)
        x_perturbed = x + noise_std * randn(x.shape, private, dtype=x.dtype, device=x.device)
        for _ in range(steps):
            grad, _ = objective.gradient(x_perturbed, y)
            x_perturbed = (x_perturbed + step_size * grad.sign()).clamp(lower, upper)
    return x_perturbed
