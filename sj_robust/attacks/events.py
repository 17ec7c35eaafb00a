"""Attacks on event frames that add or remove at most ``eps`` events per sample: binary frames
stay binary, numbers of events stay integers >= 0.

Frames are [N, T, 2, H, W], samples first like the images of every other attack and as a loader of
SpikingJelly's event data sets stacks them; ``SpikingEventClassifier`` hands them to the network as
[T, N, 2, H, W].
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sj_robust.attacks._event_search import (
    CountSearch,
    EventSearch,
    Settings,
    apply_changes,
    check_tries,
    first_that_fools,
    largest,
    searched,
    uniform,
    units,
)
from sj_robust.attacks._planes import Planes, in_units, summed
from sj_robust.attacks.call import Loss, Model, Randomness
from sj_robust.core.checks import (
    check_choice,
    check_events,
    check_labels,
    check_model,
    is_checked,
)
from sj_robust.core.randomness import Private, check_seeds
from sj_robust.core.threat import Threat, as_counts, as_threat

__all__ = ["check_frames", "count_flips", "flip_events", "random_flips"]

Allow = Literal["both", "add", "remove"]


def flip_events(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
    allow: Allow = "both",
    steps: int = 20,
    probes: int = 10,
    queries: int = 100,
    target_classes: int = 0,
    restarts: int = 1,
    eot_samples: int = 1,
    confidence: float = 0.0,
    reduce: bool = True,
    keep_best: bool = True,
    loss: Loss | None = None,
    generator: Randomness = None,
) -> Tensor:
    """Sparse attack on event frames: few events added or removed, chosen by gradient; then changes
    that are not needed are undone.

    事件帧稀疏攻击：按梯度选择至多 eps 个事件翻转，再撤销不必要的翻转。

    Equation: ``gain = grad_x loss(model(x), y) * (1 - 2 x)``, the first-order change of the loss
    when an event is added (x = 0) or removed (x = 1). In each of ``steps`` steps the gradient is
    computed again and the ``eps / steps`` elements with the largest gain are changed, until the
    sample fools the network. Reduction then undoes changes as long as the sample still fools it:
    first the longest run of the least important ones, found by bisection, then one by one until
    none can be undone.

    The gradient of a spiking network is a surrogate, so three things are added. ``probes`` more
    candidates than needed are tried one by one with a forward each, and those that raise the loss
    most are used. Among elements of equal gain, such as zero, the choice is random. If a sample
    does not fool the network when the budget is spent, ``queries`` random exchanges of its changes
    are tried, which need no gradient: at first 30 % of the changes are exchanged, at the end a
    single one, and an exchange is kept if the loss does not fall.

    On a linear model with two classes, the result is the smallest set of changes that fools it;
    with more classes, this holds if ``target_classes`` is the number of all other classes.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`, for event frames
    [N, T, 2, H, W] instead of images. A sample that is already misclassified (with a loss of at
    least ``confidence``) is returned unchanged; ``count_flips`` counts the elements that differ.

    Args:
        eps: Largest number of elements changed per sample, or a ``ThreatModel`` in L0; where that
            says ``counts``, a change adds an event to a value or removes one, up to 8 of each per
            value.
        allow: ``"add"`` events only, ``"remove"`` events only, or ``"both"``.
        steps: Gradient steps over which the budget is spent.
        probes: Candidates beyond those needed in a step; 0 trusts the gradient and needs no
            additional forwards.
        queries: Random exchanges for a sample that does not fool the network when the budget is
            spent, one forward each.
        target_classes: Number of further runs, each towards one of the most likely wrong classes at
            ``x``.
        restarts: Number of runs; in all but the first, gains are scaled by random factors.
        confidence: Loss from which a sample counts as a success, in units of the logits for the
            default loss. Use more than 0 for a stochastic model, since a sample at the decision
            boundary succeeds in only half of the draws.
        reduce: Whether to undo needless changes, and to let further runs look for fewer changes
            than found so far; False stops at the first success, which is enough to measure
            accuracy.
        keep_best: Whether a sample without success is returned as the frames of highest loss that
            were seen; False returns the last ones.
        loss: A function of logits and labels that returns one value per sample, [N]; by default the
            lead ``max_{c != y} logits[c] - logits[y]``, which ranks candidates better than the
            saturating cross entropy.

    Source: generation and reduction, with candidates judged by the change of the loss, as in the
        sparse dynamic attack of Lun et al. (CVPR 2025), which has no budget; gradients as flips of
        binary frames after Liang et al. (TNNLS 2021) and Buechel et al. (Frontiers in Neuroscience
        2022); random exchanges as in Sparse-RS (Croce et al., AAAI 2022).

    Examples:
        >>> x, weight = torch.zeros(1, 2, 2, 1, 1), torch.tensor([0.0, 3.0, 1.0, 2.0])
        >>> model = lambda frames: torch.stack(
        ...     [frames.flatten(1) @ weight, torch.full((1,), 4.5)], dim=1
        ... )
        >>> flip_events(model, x, torch.tensor([1]), eps=3).flatten()
        tensor([0., 1., 0., 1.])
    """
    threat = as_threat(eps, "L0")
    flips = int(threat.eps)
    x = checked_frames(model, x, y, generator, counts=threat.counts)
    check_choice("allow", allow, get_args(Allow))
    settings = Settings(
        steps=steps,
        probes=probes,
        queries=queries,
        target_classes=target_classes,
        restarts=restarts,
        eot_samples=eot_samples,
        confidence=confidence,
        reduce=reduce,
        keep_best=keep_best,
        loss=loss,
    )
    if not threat.counts:
        make = partial(EventSearch, changeable=_changeable(x, allow))
        return searched(model, x, y, make, settings, budget=flips, planes=1, generator=generator)
    planes = in_units(x, max(1, flips))
    of_counts = partial(CountSearch, changeable=_changeable_units(planes, allow), planes=planes)
    found = searched(
        model,
        planes.frames,
        y,
        of_counts,
        settings,
        budget=flips,
        planes=planes.number,
        generator=generator,
    )
    return summed(found, planes.number)


def random_flips(
    model: Model | None,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: Threat,
    allow: Allow = "both",
    tries: int = 1,
    eot_samples: int = 1,
    generator: Randomness = None,
) -> Tensor:
    """Random events added or removed, the control of :func:`flip_events` at equal budget.

    随机翻转事件，稀疏攻击的对照。

    Equation: ``x_adv = |x - m|`` with m uniform among the masks with ``eps`` ones (or all
    elements that ``allow`` permits, if there are fewer). With ``counts``, each of ``eps`` drawn
    values gains or loses an event.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`, for event frames
    [N, T, 2, H, W]; ``model`` and ``y`` may be None and are used only if
    ``tries`` > 1.

    Args:
        eps: Number of changes per sample, or a ``ThreatModel`` in L0.
        allow: ``"add"`` events only, ``"remove"`` events only, or ``"both"``.
        tries: Draws per sample; the first one that fools the model is kept, otherwise the last one.
        eot_samples: Forwards whose mean logits say so, >= 1, for stochastic networks.

    Raises:
        ValueError: Also if there are several tries but no model or labels.

    Source: random events as the baseline of an attack, as in Liang et al. (TNNLS 2021).

    Examples:
        >>> x = torch.zeros(3, 4, 2, 5, 5)
        >>> count_flips(random_flips(None, x, eps=7, generator=torch.Generator().manual_seed(0)), x)
        tensor([7, 7, 7])
    """
    threat = as_threat(eps, "L0")
    flips = int(threat.eps)
    x = checked_frames(model, x, y, generator, counts=threat.counts, optional=True)
    check_choice("allow", allow, get_args(Allow))
    check_tries(tries, eot_samples, model, y)
    if flips == 0 or x.numel() == 0:
        return x
    fooling = partial(first_that_fools, tries=tries, eot_samples=eot_samples, generator=generator)
    if not threat.counts:
        draw = _drawing(x, _changeable(x, allow), flips, partial(uniform, x))
        return fooling(model, x, y, draw, planes=1)
    planes = in_units(x, 1)
    draw = _drawing(
        planes.frames,
        _changeable_units(planes, allow),
        flips,
        partial(units, planes),
        planes.one_way,
    )
    found = fooling(model, planes.frames, y, draw, planes=planes.number)
    return summed(found, planes.number)


def _drawing(
    frames: Tensor,
    changeable: Tensor,
    flips: int,
    numbers: Callable[[Private], Tensor],
    taking: Callable[[Tensor], Tensor] = lambda order: order,
) -> Callable[[Private], Tensor]:
    """Frames with so many changes at random, by the largest of the drawn numbers [N, D], of which
    ``taking`` may rule some out.
    """
    most = min(flips, changeable.shape[1])
    size = torch.full((len(frames),), most, device=frames.device)

    def draw(private: Private) -> Tensor:
        order = numbers(private).masked_fill(~changeable, -torch.inf)
        return apply_changes(frames, largest(taking(order), size))

    return draw


def count_flips(x_adv: Tensor, x: Tensor) -> Tensor:
    """Number of changed elements per sample; for counts, the number of events added or removed.

    Equation: ``k_n = sum |x_adv[n] - x[n]|``, which is the L0 distance for binary frames.

    Args:
        x_adv: Event frames of an attack.
        x: The frames it started from, in the same shape.

    Returns:
        Counts [N] int64.

    Raises:
        ValueError: If the shapes differ or values are not finite.

    Source: the L0 distance of binary frames, as in Buechel et al. (Frontiers in Neuroscience 2022).

    Examples:
        >>> x = torch.zeros(2, 1, 2, 2, 2)
        >>> count_flips(1 - x, x)
        tensor([8, 8])
    """
    check_pair(x_adv, x)
    size = (x_adv.double() - x.double()).abs()
    return as_counts(size.ceil().flatten(1).sum(1))


def check_pair(x_adv: Tensor, x: Tensor) -> None:
    """Frames of an attack have the shape of those it started from, and are finite.
    检查一对事件帧。
    """
    if x_adv.shape != x.shape:
        raise ValueError(
            f"x_adv must have the shape of x, {list(x.shape)}, got {list(x_adv.shape)}"
        )
    for name, frames in (("x_adv", x_adv), ("x", x)):
        if not bool(frames.isfinite().all()):
            raise ValueError(f"{name} must be finite, got nan or inf; omit those samples")


def check_frames(x: Tensor, *, counts: bool = False) -> None:
    """Check that event frames are floating point, [N, T, 2, H, W] (one channel if polarities are
    merged), and all 0 or 1, or with ``counts`` numbers of events.

    Args:
        x: The frames.
        counts: Whether they hold numbers of events.

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If it has another shape or another value.

    Source: binary frames of Lun et al. (CVPR 2025), section 5.

    Examples:
        >>> check_frames(torch.full((1, 4, 2, 5, 5), 0.5))
        Traceback (most recent call last):
        ...
        ValueError: x must be binary event frames (0 or 1), got values from 0.5 to 0.5; for numbers
        of events pass counts=True, or take (x > 0).to(x.dtype): the network must be trained on such
        frames
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x must be a tensor of event frames, got {type(x).__name__}; use "
            "torch.from_numpy(frames)"
        )
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}; use (x > 0).float()")
    if x.ndim != 5:
        remedy = "integrate the events into frames first"
        if x.ndim == 4:
            remedy = "add N with x.unsqueeze(0)"
        raise ValueError(
            f"x must be event frames [N, T, 2, H, W], got shape {tuple(x.shape)}; {remedy}"
        )
    if x.shape[2] not in (1, 2):
        raise ValueError(
            "x must be event frames [N, T, 2, H, W] of 2 polarities (1 if merged), got "
            f"{x.shape[2]} in shape {tuple(x.shape)}; move the polarity to dimension 2"
        )
    check_events(x, counts=counts)


def checked_frames(
    model: object,
    x: Tensor,
    y: Any,
    generator: Randomness,
    *,
    counts: bool,
    optional: bool = False,
) -> Tensor:
    """Check the arguments of an attack on frames, and copy the frames; model and labels may be
    None if ``optional``.
    """
    if not is_checked():
        if model is not None or not optional:
            check_model(model)
        check_frames(x, counts=counts)
        if y is not None or not optional:
            check_labels(y, x)
    check_seeds(generator, x)
    with torch.inference_mode(False):
        return x.detach().clone()


def _changeable(x: Tensor, allow: Allow) -> Tensor:
    """Where a change is allowed, [N, D] bool."""
    flat = x.flatten(1)
    return _allowed(flat == 0, flat == 1, allow)


def _changeable_units(planes: Planes, allow: Allow) -> Tensor:
    """The same for numbers of events in planes."""
    add, remove = planes.parts()
    return _allowed(add, remove, allow)


def _allowed(add: Tensor, remove: Tensor, allow: Allow) -> Tensor:
    match allow:
        case "add":
            return add
        case "remove":
            return remove
        case "both":
            return add | remove
