"""Worst case per sample over attacks, gradient estimators and seeds."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sj_robust.attacks._call import Model, crafting
from sj_robust.attacks.checks import check_count, check_images, check_labels, check_logits, check_model
from sj_robust.attacks.projection import l2_norm
from sj_robust.attacks.randomness import SampleSeeds, check_seeds, seeded_globals

__all__ = ["Member", "Outcome", "SampleAttack", "WorstCase", "craft", "fools", "worst_case"]

_TOLERANCE = 1e-6  # of the ball's radius, for attacks of other packages that round to the nearest


class SampleAttack(Protocol):
    """An attack with its budget bound, such as ``functools.partial(pgd, eps=0.1, step_size=0.02, steps=10)``."""

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: SampleSeeds) -> Tensor:
        """Perturbed images."""


@dataclass(frozen=True)
class Member:
    """One attack of a set whose worst case counts. 最坏情况评估中的一项攻击。

    Attributes:
        name: Unique within a set, such as ``"apgd_ce/atan:4/r1"``; part of the seed of its randomness.
        attack: The attack with its budget bound.
        estimator: Gradient estimator it crafts with, a name that ``estimator`` knows; ``"training"`` changes nothing.
        group: Members of one group attack only what the earlier ones left standing; each member of group ``""``
            attacks every image that is classified right.
        seed: Number of the restart, part of the seed of its randomness.
        ball: Norm (``"Linf"`` or ``"L2"``) and radius that its images must keep, in units of [0, 1] images; None
            where there is no ball, as for Gaussian noise.

    Raises:
        TypeError: If the attack cannot be called or the seed is not an integer.
        ValueError: If the name is empty, the seed negative or the norm unknown.

    Example:
        >>> from functools import partial
        >>> from sj_robust.attacks import fgsm
        >>> Member("fgsm", partial(fgsm, eps=0.1), ball=("Linf", 0.1)).estimator
        'training'
    """

    name: str
    attack: SampleAttack
    estimator: str = "training"
    group: str = "suite"
    seed: int = 0
    ball: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a member needs a name, got ''; name it by attack, estimator and restart")
        if not callable(self.attack):
            raise TypeError(f"attack must be a callable, got {type(self.attack).__name__}; use functools.partial")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {type(self.seed).__name__}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}; number restarts from 0")
        if self.ball is not None and self.ball[0] not in ("Linf", "L2"):
            raise ValueError(f"the norm of a ball must be 'Linf' or 'L2', got {self.ball[0]!r}")


@dataclass(frozen=True)
class Outcome:
    """What one member did to the images of a batch. 单项攻击的结果。

    Attributes:
        name: Name of the member.
        group: Its group.
        attacked: Images it was run on, [N] bool.
        fooled: Images of those that the true network gets wrong afterwards, [N] bool.
        seconds: Time it took, scoring included.
    """

    name: str
    group: str
    attacked: Tensor
    fooled: Tensor
    seconds: float


@dataclass(frozen=True)
class WorstCase:
    """Result of :func:`worst_case`. 最坏情况结果。

    Attributes:
        x_adv: Images of the first member that fooled the network; the clean image where none did.
        correct: Images that are classified right without an attack, [N] bool.
        fooled_by: Index of the first member that fooled the network, [N] int64; -1 where none did.
        outcomes: One per member, in their order.
    """

    x_adv: Tensor
    correct: Tensor
    fooled_by: Tensor
    outcomes: tuple[Outcome, ...]

    @property
    def robust_accuracy(self) -> float:
        """Share of all images that are classified right and that no member fooled; NaN without images."""
        return float((self.correct & (self.fooled_by < 0)).double().mean())

    def standing(self, group: str) -> Tensor:
        """Images classified right that no member of one group fooled, [N] bool.

        Raises:
            ValueError: If there is no such group.
        """
        outcomes = [outcome for outcome in self.outcomes if outcome.group == group]
        if not outcomes:
            groups = sorted({outcome.group for outcome in self.outcomes})
            raise ValueError(f"group must be one of {groups}, got {group!r}")
        return self.correct & ~torch.stack([outcome.fooled for outcome in outcomes]).any(0)


def worst_case(
    model: Model, x: Tensor, y: Tensor, members: Sequence[Member], *, seeds: SampleSeeds, draws: int = 1
) -> WorstCase:
    """Run the members one after the other and keep, per sample, the first that fools the network.

    逐样本取多种攻击与梯度估计的最坏情况。

    Equation: ``robust accuracy = mean_n [right on x_n and on a_m(x_n) for every member m]``. A member attacks what is
    classified right and still stands in its group. Every success is scored again by :func:`fools`.

    Args:
        model: Images [N, ...] in [0, 1] to logits [N, classes]; an ``nn.Module`` where a member has an estimator.
        x: Images, floating point.
        y: Labels [N] int64.
        members: What is run, in this order.
        seeds: One seed per sample; the result of a sample then depends on neither its neighbours nor the batch size
            (unless the network itself draws random numbers).
        draws: Forwards in every one of which a stochastic network has to be wrong.

    Returns:
        The images, what fooled each sample, and every member's outcome and seconds.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If images, labels or seeds do not fit, names repeat, or an attack leaves its budget.

    Source: per-sample worst case as in AutoAttack (Croce and Hein, ICML 2020), over several gradients as Bu et al.
        (TMLR 2024) ensemble them for spiking networks.

    Example:
        >>> from functools import partial
        >>> from sj_robust.attacks import fgsm, pgd
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> x, y = torch.tensor([[0.6, 0.5], [0.9, 0.1]]), torch.tensor([0, 0])
        >>> members = [Member("fgsm", partial(fgsm, eps=0.1))]
        >>> result = worst_case(model, x, y, members, seeds=SampleSeeds([0, 1]))
        >>> result.fooled_by.tolist(), result.robust_accuracy
        ([0, -1], 0.5)
    """
    if len({member.name for member in members}) < len(members):
        raise ValueError(f"names of members must differ, got {[member.name for member in members]}; add the restart")
    correct = ~fools(model, x, y, draws=draws, seeds=seeds)
    standing = {member.group: correct.clone() for member in members}
    x_adv, fooled_by = x.detach().clone(), torch.full_like(y, -1)
    outcomes = []
    for index, member in enumerate(members):
        start = clock(x.device)
        attacked = correct if member.group == "" else standing[member.group].clone()
        fooled = torch.zeros_like(attacked)
        rows = attacked.nonzero().flatten()
        if len(rows):
            own = seeds.rows(rows)
            images = craft(model, x[rows], y[rows], member, seeds=own)
            hit = fools(model, images, y[rows], draws=draws, seeds=own.derived("score", member.name))
            fooled[rows] = hit
            first = hit & (fooled_by[rows] < 0)
            x_adv[rows[first]] = images[first]
            fooled_by[rows[first]] = index
            standing[member.group] &= ~fooled
        outcomes.append(Outcome(member.name, member.group, attacked, fooled, clock(x.device) - start))
    return WorstCase(x_adv, correct, fooled_by, tuple(outcomes))


def craft(model: Model, x: Tensor, y: Tensor, member: Member, *, seeds: SampleSeeds) -> Tensor:
    """Adversarial images of one member, its gradient estimator applied. 用指定梯度估计生成对抗样本。

    The network is attacked in evaluation mode; modes, global random state and hooks are as before afterwards.

    Args:
        model: Images [N, ...] in [0, 1] to logits; an ``nn.Module`` unless the estimator is ``"training"``.
        x: Images, floating point.
        y: Labels [N] int64.
        member: Which attack, estimator and restart.
        seeds: One seed per sample, from which the member derives its own.

    Returns:
        Images in shape, dtype and device of ``x``.

    Raises:
        TypeError: If an argument has the wrong type, or the attack returns no images of the dtype of ``x``.
        ValueError: If images, labels or seeds do not fit, or the attack leaves [0, 1], its ball or the shape.

    Example:
        >>> from functools import partial
        >>> from sj_robust.attacks import pgd
        >>> member = Member("pgd", partial(pgd, eps=0.1, step_size=0.05, steps=3))
        >>> x, y = torch.rand(2, 5), torch.tensor([0, 1])
        >>> craft(nn.Linear(5, 3), x, y, member, seeds=SampleSeeds([0, 1])).shape
        torch.Size([2, 5])
    """
    check_model(model)
    check_images(x)
    check_labels(y, x)
    _check_seeds(seeds, x)
    if x.numel() == 0:
        return x.detach().clone()
    own = seeds.derived(member.name, member.seed)
    with crafting(model, x.device, own), _estimator(member, model) as crafted_on:
        # Copies made here are ordinary tensors also where the caller is in inference mode.
        x_adv = member.attack(crafted_on, x.detach().clone(), y.clone(), generator=own)
    _check_result(x_adv, x, member)
    return x_adv.detach()


def fools(model: Model, x: Tensor, y: Tensor, *, draws: int = 1, seeds: SampleSeeds) -> Tensor:
    """Whether the true network gets an image wrong in every one of several fresh forwards. 在真实网络上复核。

    Equation: ``fooled_n = all_d [argmax model(x; draw d)_n != y_n]``. Nothing of an estimator is in force here. A
    stochastic network has other noise in every draw; one draw too lucky for the attacker does not count. Forwards
    after the first see only what is still wrong.

    Args:
        model: Images [N, ...] in [0, 1] to logits [N, classes]; a module is scored in evaluation mode.
        x: Images, clean or adversarial.
        y: Labels [N] int64.
        draws: Number of forwards, >= 1; 1 is enough for a deterministic network.
        seeds: One seed per sample; they seed the network's own use of torch's global generators.

    Returns:
        [N] bool.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If images, labels, seeds or logits do not fit, or ``draws`` < 1.

    Example:
        >>> x, y = torch.eye(2), torch.tensor([0, 0])
        >>> fools(lambda x: x, x, y, seeds=SampleSeeds([0, 1]))
        tensor([False,  True])
    """
    check_model(model)
    check_images(x)
    check_labels(y, x)
    check_count("draws", draws)
    _check_seeds(seeds, x)
    wrong = torch.arange(len(x), device=x.device)
    for draw in range(draws):
        if len(wrong) == 0:
            break
        seed = seeds.derived("draw", draw).single()
        logits = scored(model, x[wrong], y[wrong], seed=seed)
        wrong = wrong[logits.argmax(1) != y[wrong]]
    fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    fooled[wrong] = True
    return fooled


def scored(model: Model, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
    """Logits of the model as it is, in evaluation mode, without a gradient, its noise seeded by ``seed``."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if isinstance(model, nn.Module):
            model.eval()
        with torch.no_grad(), seeded_globals(seed, x.device):
            return check_logits(model(x), y)
    finally:
        for module, training in modes:
            module.training = training


def clock(device: torch.device) -> float:
    """Seconds, after all that was started on a GPU has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _estimator(member: Member, model: Model) -> AbstractContextManager[Model]:
    """Context that yields what the member crafts on; without an estimator nothing of SpikingJelly is needed."""
    if member.estimator == "training":
        return nullcontext(model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"estimator {member.estimator!r} of {member.name!r} needs the network as an nn.Module, got "
            f"{type(model).__name__}; pass the network itself, or use the estimator 'training'"
        )
    from sj_robust.attacks.estimators import estimator

    return estimator(member.estimator)(model)


def _check_seeds(seeds: SampleSeeds, x: Tensor) -> None:
    if not isinstance(seeds, SampleSeeds):
        raise TypeError(f"seeds must be SampleSeeds, got {type(seeds).__name__}; use SampleSeeds(range(len(x)))")
    check_seeds(seeds, x)


def _check_result(x_adv: Tensor, x: Tensor, member: Member) -> None:
    """What an attack returns are images of the same kind, inside the box and inside the member's ball."""
    if not isinstance(x_adv, Tensor) or x_adv.dtype != x.dtype or x_adv.device != x.device:
        got = f"{x_adv.dtype} on {x_adv.device}" if isinstance(x_adv, Tensor) else type(x_adv).__name__
        raise TypeError(f"attack {member.name!r} must return images of {x.dtype} on {x.device}, got {got}")
    if x_adv.shape != x.shape:
        raise ValueError(
            f"attack {member.name!r} must return images of shape {list(x.shape)}, got {list(x_adv.shape)}; "
            "it has to return one image per sample"
        )
    try:
        check_images(x_adv)
    except ValueError as error:
        raise ValueError(f"attack {member.name!r} left the images: {error}") from error
    if member.ball is None:
        return
    norm, eps = member.ball
    delta = (x_adv.detach().double() - x.double()).flatten(1)
    distance = float((delta.abs().amax(1) if norm == "Linf" else l2_norm(delta)).max())
    if distance > eps + _TOLERANCE * max(1.0, eps):
        raise ValueError(
            f"attack {member.name!r} must stay within {norm} distance {eps:g}, got {distance:.8g}; project its result"
        )
