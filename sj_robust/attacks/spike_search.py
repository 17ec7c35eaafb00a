"""Search for spikes that fool a network: small moves judged by the network itself, from where
gradient attacks stop.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from sj_robust.attacks._first_spikes import first_spikes
from sj_robust.attacks._moves import FLIPS, MOVES, Moves
from sj_robust.attacks._spike_walk import STAGES, Plan, SpikeSearch
from sj_robust.attacks.apgd import LEAST_CLASSES, apgd
from sj_robust.attacks.call import (
    Model,
    Randomness,
    checked_copies,
    crafting,
    quicker,
    seeds_of_samples,
    wide,
)
from sj_robust.attacks.logits import clean_logits, differ, leads, margin
from sj_robust.attacks.sapgd import sapgd
from sj_robust.core.checks import check_choice, check_count, check_images, is_checked
from sj_robust.core.host import is_neuron
from sj_robust.core.preserved import RandomNumbers
from sj_robust.core.randomness import SampleSeeds, draw_seed
from sj_robust.core.threat import Threat, ThreatModel, as_threat

__all__ = ["searched", "spike_search"]

PROPOSALS_AT_ONCE = 512
"""Images in one forward if nobody says how many."""
_STEPS = 50  # of the attacks that find starts where none are given
_MANY = 20_000  # forwards below which all chains head for the nearest rival


def spike_search(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
    starts: Tensor | Sequence[Tensor] | None = None,
    forwards: int = 50_000,
    stages: int = len(STAGES),
    moves: Sequence[str] = tuple(MOVES),
    batch_size: int = PROPOSALS_AT_ONCE,
    generator: Randomness = None,
) -> Tensor:
    """Search over spikes: small moves that lower the margin of the network itself, without a
    surrogate.

    直接在真实网络上搜索脉冲翻转，不依赖替代梯度。

    Equation: a chain with rival k moves from x to a proposal x' if ``m(x') <= m(x) + heat * e``,
    with the lead ``m = z_y - z_k`` and e drawn from the exponential distribution with mean 1, until
    ``argmax z != y``.

    Under direct encoding a spiking network is constant in the image except where a current passes a
    threshold. Gradient attacks follow a surrogate of these steps and end where it gives no more
    information; this search starts there. Every proposal is judged by the network, so only the
    starts depend on a gradient.

    - ``"elements"``, ``"patch"``: one to three elements, or a small square, get new values.
    - ``"cross"``: a square is copied from another image found for the sample.
    - ``"flip"``, ``"guided_flip"``: the current of a neuron of the first spiking layer is moved
      just across its next threshold. These moves need a current that is affine in the image and the
      same in every step (direct encoding; convolution, linear layer, batch norm, mean and std),
      images of at most 16384 elements and a model that is an ``nn.Module``; otherwise they are
      skipped, with a warning if the network has spiking neurons.

    Of every four proposals, only the most promising one is tried, judged by the results of the
    sample's earlier moves. Chains work in seven stages of 2 to 18 chains per sample. From 20,000
    forwards on, they share the three nearest rivals; with fewer, all head for the nearest one. The
    unit of a sample's margins is the mean size of the changes that its moves have made, because one
    spike changes the margin of a small network much, but at least 8 per cent of the margin of its
    image, because it changes that of a large network little. ``heat`` begins with a tenth of this
    unit. After the first stage, which uses 1 per cent of the forwards, a sample takes part in the
    others only if its smallest margin is at most 3, 1.8, 1.4, 1.2, 1 and 0.7 units, so that
    forwards are spent where they may change the outcome. All of this is per sample: the result
    depends neither on the batch size nor on the other samples.

    The network may have any deterministic encoding; one that draws random numbers is refused. Event
    frames do not stay binary here: use :func:`flip_events` for them.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`. Where nothing fooled
    the network, the result is the image of the smallest margin; images that are already
    misclassified are returned unchanged. On a CPU, call :func:`sj_robust.ops.keep_heap` first,
    which halves the time.

    Args:
        starts: Images that earlier attacks found for these samples, [S, N, ...] or a sequence of
            [N, ...]; they are projected into the ball, and should differ as much as possible. None
            runs APGD with two losses and, in Linf, SA-PGD, 50 steps each. A network without a
            gradient needs starts, such as ``[x]``.
        forwards: Largest number of proposals per sample, each judged in one forward, which is
            reached if the sample takes part to the end; at least 50 then, one per chain. Not
            counted are the forwards on images and starts, 68 images by which the flips are
            checked, and the attacks that find starts.
        stages: How many of the seven stages are run; with fewer, the search ends early, and is the
            same up to there.
        moves: Kinds of moves, which are tried in turn.
        batch_size: Images in one forward, which bounds the memory; results do not depend on it.

    Raises:
        TypeError: Also if starts are no tensors.
        ValueError: Also if starts do not fit, a kind of move is unknown, only flips are left and
            the network allows none, or the network draws random numbers or gives different logits
            for the same images.

    Source: derived here. The closest published attack is the Square Attack of Andriushchenko et al.
        (ECCV 2020); for binary inputs, SpikeFool (Büchel et al., 2022) flips events by gradient.

    Examples:
        >>> from sj_robust.attacks import spike_search
        >>> steps = lambda x: 1.05 - (x.flatten(1) > 0.55).sum(1) / 10
        >>> model = lambda x: torch.stack([torch.zeros(len(x)), steps(x)], 1)  # has no gradient
        >>> x, y = torch.full((1, 1, 4, 4), 0.5), torch.tensor([1])
        >>> model(spike_search(model, x, y, eps=0.1, starts=[x])).argmax(1)
        tensor([0])
    """
    ball = as_threat(eps, "Linf", "L2")
    check_count("forwards", forwards)
    check_count("stages", stages)
    check_count("batch_size", batch_size)
    kinds = _checked_moves(moves)
    x, y = checked_copies(model, x, y, generator)
    if isinstance(starts, Tensor) and starts.shape == (0, *x.shape):
        starts = None
    given = None if starts is None else _checked_starts(starts, x)
    if x.numel() == 0 or ball.eps == 0:
        return x
    with crafting(model, x.device, generator) as private:
        logits = clean_logits(model, x, y)
        _check_repeats(model, x, logits)
        seeds = seeds_of_samples(private, len(x), draw_seed(private)).derived("spike_search")
        right = logits.argmax(1) == y
        x_adv = x.clone()
        if bool(right.any()):
            images = x[right]
            labels = y[right]
            own = seeds.rows(right)
            if given is None:
                found = _own_starts(model, images, labels, ball, logits.shape[1], own)
            else:
                found = torch.stack([ball.project(images, start) for start in given[:, right]])
            plan = Plan(kinds, forwards, run=stages, batch_size=batch_size)
            if forwards < _MANY:
                plan = replace(plan, rivals=1)
            x_adv[right] = searched(model, images, labels, found, ball, plan, own)
    return x_adv


@torch.no_grad()
def searched(
    model: Model,
    x: Tensor,
    y: Tensor,
    starts: Tensor,
    ball: ThreatModel,
    plan: Plan,
    seeds: SampleSeeds,
) -> Tensor:
    """Images that fool, a start where one does, and elsewhere those of the smallest margin."""
    scores = [clean_logits(model, start, y) for start in starts]
    wrong = torch.stack([logits.argmax(1) != y for logits in scores], 1)
    found = wide(torch.stack([leads(logits, y) for logits in scores], 1))
    first_wrong = wrong.int().argmax(1)
    x_adv = starts[first_wrong, torch.arange(len(x), device=x.device)]
    rows = (~wrong.any(1)).nonzero().squeeze(1)
    if len(rows) == 0:
        return x_adv
    spikes = None
    if set(plan.moves) & set(FLIPS):
        spikes = first_spikes(model, x)
        if spikes is None:
            plan = replace(plan, moves=_without_flips(plan.moves))
            _say_that_none_is_flipped(model)
    logits = clean_logits(model, x[rows], y[rows])
    search = SpikeSearch(
        network=model,
        quicker=quicker(model, x[rows], logits),
        moves=Moves(_shape(x), spikes),
        plan=plan,
        ball=ball,
        x=x[rows],
        y=y[rows],
        pool=wide(starts[:, rows]).transpose(0, 1).flatten(2),
        leads=found[rows],
        clean=wide(margin(logits, y[rows])),
    )
    x_adv[rows] = search.run(seeds.rows(rows))
    return x_adv


def _own_starts(
    model: Model, x: Tensor, y: Tensor, ball: ThreatModel, classes: int, seeds: SampleSeeds
) -> Tensor:
    """What short gradient attacks find by the gradient that the network has, [S, N, ...]."""
    attack = partial(apgd, model, x, y, eps=ball, steps=_STEPS)
    ratio: Literal["ce", "dlr"] = "dlr" if classes >= LEAST_CLASSES["dlr"] else "ce"
    found = [
        attack(loss="ce", generator=seeds.derived("start", 0)),
        attack(loss=ratio, generator=seeds.derived("start", 1)),
    ]
    if ball.norm == "Linf":
        own = seeds.derived("start", 2)
        found.append(sapgd(model, x, y, eps=ball, steps=_STEPS, generator=own))
    return torch.stack(found)


def _checked_moves(moves: Sequence[str]) -> tuple[str, ...]:
    for kind in moves:
        check_choice("moves", kind, MOVES)
    if isinstance(moves, str) or not moves:
        raise ValueError(f"moves must name at least one kind, got {moves!r}; omit it for all")
    return tuple(moves)


def _without_flips(moves: tuple[str, ...]) -> tuple[str, ...]:
    kept = tuple(kind for kind in moves if kind not in FLIPS)
    if not kept:
        raise ValueError(
            "flips need a first spiking layer whose current is affine in the image and the same "
            f"in every time step, got moves={moves!r} and none; name other moves as well"
        )
    return kept


def _say_that_none_is_flipped(model: Model) -> None:
    """Warn for a network that has spikes and yet none that this search flips."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if any(is_neuron(module) for module in modules):
        warnings.warn(
            "spike_search flips no spikes of this network: the current of its first spiking layer "
            "is not affine in the image and the same in every time step, or the network enlarges "
            "its batch, or the image is too large; its other moves remain",
            stacklevel=2,
        )


def _checked_starts(starts: Tensor | Sequence[Tensor], x: Tensor) -> Tensor:
    """Earlier images [S, N, ...] in the dtype and on the device of ``x``."""
    images = list(starts) if isinstance(starts, Sequence | Tensor) else [starts]
    for image in images:
        if not isinstance(image, Tensor):
            raise TypeError(
                f"starts must be tensors of images [N, ...], got {type(image).__name__}; give [x] "
                "for the clean images"
            )
    shapes = [list(image.shape) for image in images]
    if not images or any(image.shape != x.shape for image in images):
        raise ValueError(
            f"starts must be [S, N, ...] with N, ... = {list(x.shape)}, got {shapes}; give every "
            "sample an image, the clean one if there is no other"
        )
    if not is_checked():
        for image in images:
            check_images(image)
    return torch.stack(images).detach().to(x)


def _check_repeats(model: Model, x: Tensor, logits: Tensor) -> None:
    numbers = RandomNumbers(model, x.device)
    with torch.no_grad():
        again = model(x)
    drawn = numbers.drawn()
    if drawn or differ(logits, again):
        got = "one that draws random numbers" if drawn else "different ones"
        raise ValueError(
            f"the model must give the same logits for the same images, got {got}; attack a "
            "network that draws random numbers with apgd and eot_samples"
        )


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of images [N, ..., H, W]; features are one row."""
    if x.ndim == 2:
        return 1, 1, x.shape[1]
    height, width = x.shape[-2:]
    return x[0].numel() // (height * width), height, width
