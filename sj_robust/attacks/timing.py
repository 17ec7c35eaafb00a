"""Attacks on event frames that move events in time."""

from functools import partial

import torch
from torch import Tensor

from sj_robust.attacks._event_search import (
    Settings,
    apply_changes,
    check_tries,
    first_that_fools,
    searched,
)
from sj_robust.attacks._move_search import (
    Limits,
    MoveSearch,
    RandomMoves,
    drawn_for_moves,
    random_moved,
)
from sj_robust.attacks._planes import each_on_its_own, summed
from sj_robust.attacks.call import Loss, Model, Randomness
from sj_robust.attacks.events import check_pair, checked_frames
from sj_robust.core.randomness import Private
from sj_robust.core.threat import Moves, Threat, ThreatModel, as_threat, moves_of

__all__ = ["Moves", "count_moves", "move_events", "random_moves"]


def move_events(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
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
    """Timing attack on event frames: a few events, chosen by gradient, move to other frames;
    needless moves are undone.

    事件时间攻击：事件保持像素与极性，仅在时间上移动。

    Equation: ``gain = g[t'] - g[t]`` with ``g = grad_x loss(model(x), y)``, the first-order change
    of the loss when an event moves from frame t to the empty frame t' of its pixel and polarity,
    ``|t' - t| <= largest_shift``; divided by the shift if there is a ``total_shift``. In each of
    ``steps`` steps the gradient is computed again and the ``eps / steps`` events with the largest
    gain move, each to its best frame, until the sample fools the network. The rest is as in
    :func:`flip_events`: candidates are probed with a forward each, the moves of random pixels are
    exchanged for others, and needless moves are undone, pixel by pixel.

    Binary frames stay binary, and every pixel and polarity keeps its number of events. In binary
    frames, an event never moves to a frame that had an event at the same pixel and polarity; with
    ``counts``, a frame takes any number of events. On a linear model, the first move is the best
    one.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`, for event frames
    [N, T, 2, H, W] instead of images. ``count_moves`` counts the moves.

    Args:
        eps: Largest number of moved events per sample, or a ``ThreatModel`` of moves, which may
            limit their shifts.
        steps: Gradient steps over which the budget is spent.
        probes: Candidates beyond those needed in a step; 0 trusts the gradient and needs no
            additional forwards.
        queries: Random exchanges for a sample that does not fool the network when the budget is
            spent, one forward each.
        target_classes: Number of further runs, each towards one of the most likely wrong classes at
            ``x``.
        restarts: Number of runs; in all but the first, gains are scaled by random factors.
        confidence: Loss from which a sample counts as a success, as in :func:`flip_events`.
        reduce: Whether to undo needless moves, and to let further runs look for fewer moves than
            found so far.
        keep_best: Whether a sample without success is returned as the frames of highest loss that
            were seen; False returns the last ones.
        loss: A function of logits and labels that returns one value per sample, [N]; by default as
            in :func:`flip_events`.

    Source: the threat and its three budgets after Spike-Retiming (ICLR 2026, arXiv 2602.03284),
        which optimises a distribution of shifts; the search is the one of :func:`flip_events`.

    Examples:
        >>> x = torch.zeros(1, 4, 2, 1, 1)
        >>> x[0, 0, 1] = 1.0
        >>> when = lambda frames: (frames.flatten(2).sum(2) * torch.arange(4.0)).sum(
        ...     1
        ... )  # class 1 from frame 2 on
        >>> model = lambda frames: torch.stack([torch.full((1,), 1.5), when(frames)], dim=1)
        >>> move_events(model, x, torch.tensor([0]), eps=1)[0, :, 1].flatten()
        tensor([0., 0., 0., 1.])
    """
    threat = as_threat(eps, "moves")
    x = checked_frames(model, x, y, generator, counts=threat.counts)
    frames, planes = each_on_its_own(x, counts=threat.counts)
    limits = _limits(x, threat)
    everywhere = torch.ones_like(frames.flatten(1), dtype=torch.bool)
    own = planes if threat.counts else None
    make = partial(MoveSearch, limits=limits, changeable=everywhere, planes=own)
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
    budget = 2 * int(threat.eps) if limits.largest_shift else 0
    found = searched(
        model, frames, y, make, settings, budget=budget, planes=planes, generator=generator
    )
    return summed(found, planes)


def random_moves(
    model: Model | None,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: Threat,
    tries: int = 1,
    eot_samples: int = 1,
    generator: Randomness = None,
) -> Tensor:
    """Random events moved in time, the control of :func:`move_events` at equal budget.
    随机移动事件的时间。

    Equation: ``eps`` events are drawn at random, and each moves to a frame drawn at random among
    the empty ones within ``largest_shift``; fewer, if the total shift or the free frames are used
    up before.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`, for event frames
    [N, T, 2, H, W]; ``model`` and ``y`` may be None and are used only if ``tries`` > 1.

    Args:
        eps: Number of moved events per sample, or a ``ThreatModel`` of moves.
        tries: Draws per sample; the first one that fools the model is kept, otherwise the last one.
        eot_samples: Forwards whose mean logits say so, >= 1, for stochastic networks.

    Raises:
        ValueError: Also if there are several tries but no model or labels.

    Source: random timing as the baseline of an attack, as in Spike-Retiming (arXiv 2602.03284).

    Examples:
        >>> from sj_robust.attacks import ThreatModel
        >>> x = (torch.rand(3, 4, 2, 5, 5) < 0.1).float()
        >>> moved = random_moves(None, x, eps=ThreatModel("moves", 2, largest_shift=1))
        >>> bool((moved.sum(1) == x.sum(1)).all()), count_moves(moved, x).largest_shift.max() <= 1
        (True, tensor(True))
    """
    threat = as_threat(eps, "moves")
    x = checked_frames(model, x, y, generator, counts=threat.counts, optional=True)
    limits = _limits(x, threat)
    check_tries(tries, eot_samples, model, y)
    if threat.eps == 0 or limits.largest_shift == 0 or x.numel() == 0:
        return x
    frames, planes = each_on_its_own(x, counts=threat.counts)
    own = planes if threat.counts else None
    still = torch.zeros_like(frames.flatten(1), dtype=torch.bool)
    size = torch.full((len(x),), int(threat.eps), device=x.device)

    def draw(private: Private) -> Tensor:
        order = drawn_for_moves(frames, private, own)
        drawn = RandomMoves(order=order, worth=drawn_for_moves(frames, private, own))
        return apply_changes(frames, random_moved(frames, still, drawn, size, limits))

    found = first_that_fools(
        model,
        frames,
        y,
        draw,
        tries=tries,
        planes=planes,
        eot_samples=eot_samples,
        generator=generator,
    )
    return summed(found, planes)


def count_moves(x_adv: Tensor, x: Tensor) -> Moves:
    """Number of moved events per sample, their largest shift and their total shift.

    Equation: at each pixel and polarity, the k-th removed event in time is paired with the k-th new
        one; each pair is a move.

    Args:
        x_adv: Event frames of an attack.
        x: The frames it started from, in the same shape.

    Returns:
        ``events``, ``largest_shift`` and ``total_shift``, each [N] int64, and ``paired``: whether
        every pixel and polarity has as many events as before; if not, both shifts are 0.

    Raises:
        ValueError: If the shapes differ or values are not finite.

    Source: the budgets of Spike-Retiming (arXiv 2602.03284).

    Examples:
        >>> x, x_adv = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
        >>> count_moves(x_adv.view(1, 3, 1, 1, 1), x.view(1, 3, 1, 1, 1)).largest_shift
        tensor([2])
    """
    check_pair(x_adv, x)
    return moves_of(x, x_adv)


def _limits(x: Tensor, threat: ThreatModel) -> Limits:
    most = x.shape[1] - 1
    if threat.largest_shift is not None:
        most = min(threat.largest_shift, most)
    return Limits(most, threat.total_shift)
