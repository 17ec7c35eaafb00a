"""One attack with its gradient estimator and seed; a network and images that attacks share."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sj_robust.attacks.call import Model, crafting, quicker
from sj_robust.core.checks import (
    check_logits,
    check_samples,
    check_switch,
    taken_for_checked,
)
from sj_robust.core.preserved import evaluation_mode, seeded_network
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.threat import ThreatModel, per_sample

__all__ = [
    "Crafted",
    "Judge",
    "Member",
    "Variant",
    "attacked_copy",
    "check_estimator",
    "clock",
    "crafted",
    "fooled",
    "has_detached_reset",
    "refused",
    "scored",
]


@dataclass(frozen=True)
class Member:
    """One of the attacks over which the worst case is computed. 最坏情况评估中的一项攻击。

    Attributes:
        name: Unique within a set, such as ``"apgd_ce/atan:4/r1"``; part of the seed of its
            randomness.
        attack: The attack with its budget set, such as ``functools.partial(fgsm, eps=0.1)``.
        estimator: Name of the gradient estimator that the attack uses, see
            ``sj_robust.estimators``; ``"training"`` is the network's own surrogate.
        group: A member attacks only the images that are still correct after the earlier members of
            its group; each member of group ``""`` attacks every correctly classified image.
        seed: Number of the restart, part of the seed of its randomness.
        threat: The threat model that its images must respect; event frames must also stay binary,
            or numbers of events. None if there is none, as for Gaussian noise.
        takes_starts: Whether the attack is called with ``starts``, [S, N, ...]: for every image,
            the results of the S earlier members of its group within its threat, or the clean image
            where a member did not attack it. If members follow an earlier one that takes starts
            itself, only their results are passed.

    Raises:
        TypeError: If the attack cannot be called or the seed is not an integer.
        ValueError: If the name is empty or the seed negative.

    Examples:
        >>> from functools import partial
        >>> from sj_robust.attacks import fgsm
        >>> Member("fgsm", partial(fgsm, eps=0.1), threat=ThreatModel("Linf", 0.1)).estimator
        'training'
    """

    name: str
    attack: Callable[..., Tensor]
    estimator: str = "training"
    group: str = "suite"
    seed: int = 0
    threat: ThreatModel | None = None
    takes_starts: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(
                "a member needs a name, got ''; name it by attack, estimator and restart"
            )
        if not callable(self.attack):
            raise TypeError(
                f"attack must be a callable, got {type(self.attack).__name__}; use "
                "functools.partial"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {type(self.seed).__name__}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}; number restarts from 0")
        if self.threat is not None and not isinstance(self.threat, ThreatModel):
            raise TypeError(
                f"threat must be a ThreatModel or None, got {type(self.threat).__name__}"
            )
        check_switch("takes_starts", self.takes_starts)

    @property
    def eps(self) -> float | None:
        """The radius; None if there is no threat model."""
        return None if self.threat is None else self.threat.eps


@dataclass(frozen=True)
class Crafted:
    """Images of a member, and the distance of each from its clean one in the member's threat, [N];
    None without a threat.
    """

    x_adv: Tensor
    distance: Tensor | None


def crafted(
    model: Model,
    x: Tensor,
    y: Tensor,
    member: Member,
    *,
    seeds: SampleSeeds,
    starts: Tensor | None = None,
) -> Crafted:
    """Adversarial images of one member, its gradient estimator applied.
    用指定梯度估计生成对抗样本。

    The network is attacked in evaluation mode; modes, global random state and hooks are as before
    afterwards. Whoever asks has checked images, labels and seeds.

    Args:
        model: Images [N, ...] in [0, 1] to logits; an ``nn.Module`` unless the estimator is
            ``"training"``.
        x: Images, floating point.
        y: Labels [N] int64.
        member: Which attack, estimator and restart.
        seeds: One seed per sample, from which the member derives its own.
        starts: What a member with ``takes_starts`` begins from, [S, N, ...]; None for none.

    Raises:
        TypeError: If the attack returns no images of the dtype of ``x``.
        ValueError: If the attack leaves [0, 1], its ball or the shape.

    Examples:
        >>> from functools import partial
        >>> from sj_robust.attacks import pgd
        >>> member = Member("pgd", partial(pgd, eps=0.1, step_size=0.05, steps=3))
        >>> x, y = torch.rand(2, 5), torch.tensor([0, 1])
        >>> crafted(nn.Linear(5, 3), x, y, member, seeds=SampleSeeds([0, 1])).x_adv.shape
        torch.Size([2, 5])
    """
    if x.numel() == 0:
        return Crafted(x.detach().clone(), None)
    own = seeds.derived(member.name, member.seed)
    options = {}
    if member.takes_starts:
        options["starts"] = x.new_empty((0, *x.shape)) if starts is None else starts
    with (
        crafting(model, x.device, own),
        _estimator(member.estimator, model, of=f" of {member.name!r}") as crafted_on,
        taken_for_checked(),
    ):
        # Copies made here are ordinary tensors also where the caller is in inference mode.
        x_adv = member.attack(crafted_on, x.detach().clone(), y.clone(), generator=own, **options)
    distance = _checked_result(x_adv, x, member)
    return Crafted(x_adv.detach(), distance)


def attacked_copy(model: Model, x: Tensor) -> Model:
    """What attacks may ask in the place of a network that draws no random numbers: its quicker copy
    where there is one, else the network.

    An image that fools the copy has to be tried on the network.
    """
    with evaluation_mode(model), torch.enable_grad():  # as attacks ask
        copy = quicker(model, x, model(x))
    if copy is model or not isinstance(model, nn.Module):
        return model
    from sj_robust.estimators.applied import has_estimator

    return model if has_estimator(model) else copy


def fooled(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    draws: int,
    seeds: SampleSeeds,
    batch_size: int | None = None,
) -> Tensor:
    """Whether the true network gets an image wrong in more than half of several fresh forwards.
    在真实网络上复核。

    Equation: ``fooled_n = [sum_d [argmax model(x; draw d)_n != y_n] > draws / 2]``. Nothing of an
    estimator is active here. A stochastic network has other noise in every draw; one draw too lucky
    for the attacker does not count, and one too lucky for the network neither. With more draws it
    tends to whether the network is wrong more often than right. Every forward sees all images, so
    that what an image meets does not depend on how the others fare.

    Args:
        model: Images [N, ...] in [0, 1] to logits [N, classes]; a module is scored in evaluation
            mode.
        x: Images, clean or adversarial.
        y: Labels [N] int64.
        draws: Number of forwards, >= 1; 1 is enough for a deterministic network.
        seeds: One seed per sample; they seed the network's own use of torch's global generators.
        batch_size: Images at a time; None takes all at once.

    Returns:
        [N] bool.

    Raises:
        TypeError: If the logits have the wrong type.
        ValueError: If the logits do not fit.

    Examples:
        >>> x, y = torch.eye(2), torch.tensor([0, 0])
        >>> fooled(lambda x: x, x, y, draws=1, seeds=SampleSeeds([0, 1]))
        tensor([False,  True])
    """
    wrong = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for draw in range(draws):
        undecided = (2 * wrong <= draws) & (2 * (wrong + draws - draw) > draws)
        if not bool(undecided.any()):
            break
        seed = seeds.derived("draw", draw).single()
        wrong += scored(model, x, y, seed=seed, batch_size=batch_size).argmax(1) != y
    return 2 * wrong > draws


def scored(
    model: Model, x: Tensor, y: Tensor, *, seed: int, batch_size: int | None = None
) -> Tensor:
    """Logits of the model as it is, in evaluation mode, without a gradient, its noise seeded by
    ``seed``.
    """
    size = batch_size or max(len(x), 1)
    with evaluation_mode(model), torch.no_grad(), seeded_network(model, seed, x.device):
        parts = zip(torch.split(x, size), torch.split(y, size), strict=True)
        return torch.cat([check_logits(model(images), labels) for images, labels in parts])


def check_estimator(name: str) -> None:
    """The name is one of an estimator."""
    if name != "training":
        from sj_robust.estimators import estimator

        estimator(name)


def refused(model: Model, names: Iterable[str]) -> dict[str, str]:
    """Those of the estimators that a network does not allow, with the reason."""
    reasons = {}
    for name in names:
        try:
            with _estimator(name, model):
                pass
        except (TypeError, ValueError) as error:
            reasons[name] = str(error)
    return reasons


def has_detached_reset(name: str) -> bool:
    """Whether the estimator has a variant with the reset detached that is not the estimator
    itself.
    """
    try:
        check_estimator(f"{name}+detach")
    except ValueError:
        return False
    return not name.endswith("+detach")


def clock(device: torch.device) -> float:
    """Seconds, after all that was started on a GPU has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _estimator(name: str, model: Model, *, of: str = "") -> AbstractContextManager[Model]:
    """Context that yields what a member with this estimator crafts on; without one nothing of
    SpikingJelly is needed.
    """
    if name == "training":
        return nullcontext(model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"estimator {name!r}{of} needs the network as an nn.Module, got "
            f"{type(model).__name__}; pass the network itself, or use the estimator 'training'"
        )
    from sj_robust.estimators import estimator

    applied: AbstractContextManager[Model] = estimator(name)(model)
    return applied


def _checked_result(x_adv: Tensor, x: Tensor, member: Member) -> Tensor | None:
    """What an attack returns are images of the same kind, inside the box and inside the member's
    ball; returns their distances.
    """
    if not isinstance(x_adv, Tensor) or x_adv.dtype != x.dtype or x_adv.device != x.device:
        got = (
            f"{x_adv.dtype} on {x_adv.device}"
            if isinstance(x_adv, Tensor)
            else type(x_adv).__name__
        )
        raise TypeError(
            f"attack {member.name!r} must return images of {x.dtype} on {x.device}, got {got}"
        )
    if x_adv.shape != x.shape:
        raise ValueError(
            f"attack {member.name!r} must return images of shape {list(x.shape)}, got "
            f"{list(x_adv.shape)}; it has to return one image per sample"
        )
    threat = member.threat
    if threat is not None and threat.of_events:
        inside = threat.holds_events(x_adv)
    else:
        counted = per_sample(x.flatten(1).amax(1) > 1, x)  # no image, but numbers of events
        whole = (x_adv == x_adv.round()) & x_adv.isfinite()
        inside = (x_adv >= 0) & torch.where(counted, whole, x_adv <= 1)
    distance = None if threat is None else threat.distance(x, x_adv.detach())
    kept = inside.all()
    if threat is not None and distance is not None:
        kept &= (distance <= threat.eps + threat.tolerance(x)).all()
    if not bool(kept):  # the only question to the device, unless something is wrong
        _refuse(x, x_adv, distance, member)
    return distance


def _refuse(x: Tensor, x_adv: Tensor, distance: Tensor | None, member: Member) -> None:
    """Say what is wrong with images that left the box or the member's ball."""
    try:
        check_samples(x_adv)
    except ValueError as error:
        raise ValueError(f"attack {member.name!r} returned invalid images: {error}") from error
    threat = member.threat
    if threat is None or distance is None:
        return
    if threat.of_events and not bool(threat.holds_events(x_adv).all()):
        what = "numbers of events, integers >= 0," if threat.counts else "binary (0 or 1)"
        raise ValueError(
            f"attack {member.name!r} must leave event frames {what} within an {threat.norm} ball, "
            "got other values; an event is there or not"
        )
    largest = float(distance.max())
    if threat.norm == "L0":
        what = "events" if threat.counts else "elements"
        rule = f"change at most {threat.eps:g} {what} per sample (L0), got {largest:g}"
    elif threat.norm == "moves":
        limits = f"largest shift {threat.largest_shift}, total shift {threat.total_shift}"
        rule = (
            f"move at most {threat.eps:g} events per sample in time ({limits}; None: any), "
            f"got {largest:g} (inf: a shift is too large, or a pixel has not kept its events)"
        )
    else:
        rule = (
            f"stay within {threat.norm} distance {threat.eps:g}, got {largest:.8g}; project its "
            "result"
        )
    raise ValueError(f"attack {member.name!r} must {rule}")


class Judge(Protocol):
    """Says which images a network gets wrong, [N] bool."""

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, draws: int, seeds: SampleSeeds
    ) -> Tensor:
        """Whether each image is wrong."""


def as_it_is(network: nn.Module) -> nn.Module:
    """The network itself."""
    return network


def as_they_are(x: Tensor, start: int) -> Tensor:
    """The images themselves."""
    return x


@dataclass(frozen=True)
class Variant:
    """A network and images, one of them changed, and who attacks them; nothing is changed by
    default. 被评估的变体。

    Attributes:
        members: Attacks, in their order.
        name: Name, such as ``"weight_bits:3"`` or ``"lost_spikes:0.1/draw1"``.
        seed: Random seed.
        network: What becomes of the network, as for faults.
        images: What becomes of images, given the number of the first one, as for corruptions.
        judge: Says which images are wrong, as a vote does.
        may_draw: Whether the network draws random numbers, as one with noisy faults does.
        wrong: Numbers of the images that are known to be wrong without an attack; None asks the
            judge.
    """

    members: Sequence[Member]
    name: str = ""
    seed: int = 0
    network: Callable[[nn.Module], nn.Module] = as_it_is
    images: Callable[[Tensor, int], Tensor] = as_they_are
    judge: Judge = fooled
    may_draw: bool = False
    wrong: frozenset[int] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether network and images are as they are."""
        return self.keeps_network and self.images is as_they_are

    @property
    def keeps_network(self) -> bool:
        """Whether the network is as it is."""
        return self.network is as_it_is

    def check_names(self) -> None:
        """Raise ValueError if two members have one name, which is part of their randomness."""
        names = [member.name for member in self.members]
        if len(set(names)) < len(names) or "clean" in names:
            raise ValueError(
                f"members must have names of their own, and none may be 'clean', got {names}; add "
                "the restart"
            )
