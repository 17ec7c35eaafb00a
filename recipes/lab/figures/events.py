"""Event frames before and after an attack: numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel
from sj_robust.core.saved import SavedResult
from sj_robust.evaluation.report.verdict import budget
from sj_robust.proofs.changes import Flips
from sj_robust.proofs.moves import EVENTS, Events, MovedEvents
from sj_robust.proofs.verification import NormName, ball_of
from sj_robust.training.modes import event_attacks

_TOGETHER = 256
"""Changed frames that are run together."""

Values = list[list[float]]
"""Places, each frame, polarity, y and x, with the value there at the end."""


@dataclass(frozen=True)
class EventPictures(
    SavedResult, what="the numbers of a figure", format="sj_robust.figure.events", version=3
):
    """One sample of event frames, attacked.

    Attributes:
        network: Name of the network.
        threat: The budget, in words.
        shape: [T, polarities, height, width].
        label: The class.
        seen: The class that the network sees in the clean frames and in the attacked ones.
        clean: Number of events of every value that has some: frame, polarity, y, x and number.
        attacked: The same after the attack.
        breaking: Values that break the sample by one change, or by one move, without a number.
    """

    network: str
    threat: str
    shape: list[int]
    label: int
    seen: list[int]
    clean: Values
    attacked: Values
    breaking: Values


def event_pictures(
    name: str, model: SpikingClassifier, x: Tensor, y: Tensor, threat: ThreatModel
) -> EventPictures:
    """The first sample that the attack fools, or else the first that is right.

    Args:
        name: Name of the network.
        model: The network.
        x: Event frames [N, T, 2, H, W].
        y: Their labels.
        threat: Changed or moved events.

    Raises:
        ValueError: If the network gets none of them right.
    """
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().squeeze(1)
    if not len(right):
        raise ValueError(f"{name} misclassifies all of these {len(y)} samples; use more of them")
    x, y = x[right], y[right]
    attack = next(iter(event_attacks(threat, final=True).values()))
    x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = model(x_adv).argmax(1)
    norm: NormName = "L0" if threat.norm == "L0" else "moves"
    ball = ball_of(norm, threat.eps, threat.largest_shift, counts=threat.counts)
    assert isinstance(ball, EVENTS)
    number = int((seen != y).int().argmax())
    sample, label = x[number], y[number]
    return EventPictures(
        network=name,
        threat=budget(threat),
        shape=list(sample.shape),
        label=int(label),
        seen=[int(label), int(seen[number])],
        clean=_values(sample),
        attacked=_values(x_adv[number]),
        breaking=_values(breaking_alone(model, sample, label, ball).float()),
    )


def breaking_alone(model: SpikingClassifier, sample: Tensor, label: Tensor, ball: Events) -> Tensor:
    """Which values of a sample [T, *] break it by a single change, or by a single move of an event,
    bool [T, *]: all of them are tried.
    """
    places, steps = (
        _single_moves(sample, ball) if isinstance(ball, MovedEvents) else _flips(sample, ball)
    )
    flat = sample.flatten()
    found = torch.zeros_like(flat, dtype=torch.bool)
    for start in range(0, len(places), _TOGETHER):
        own = places[start : start + _TOGETHER]
        changed = flat.repeat(len(own), 1).scatter_add(1, own, steps[start : start + _TOGETHER])
        with torch.no_grad():
            wrong = model(changed.view(-1, *sample.shape)).argmax(1) != label
        found[own[wrong, 0]] = True
    return found.view(sample.shape)


def _flips(sample: Tensor, ball: Flips) -> tuple[Tensor, Tensor]:
    """Number of the value that each single change changes, [M, 1], and the difference."""
    flat = sample.flatten()
    every = torch.arange(len(flat))
    added, removed = (number[0].flatten() > 0 for number in ball.reach(sample.unsqueeze(0)))
    places = torch.cat([every[added], every[removed]]).unsqueeze(1)
    rises = torch.ones(int(added.sum()), 1)
    falls = -torch.ones(int(removed.sum()), 1)
    return places, torch.cat([rises, falls]).to(flat.dtype)


def _single_moves(sample: Tensor, ball: MovedEvents) -> tuple[Tensor, Tensor]:
    """Numbers of the values that each single move takes an event from and brings it to, [M, 2], and
    what it does to them.
    """
    numbers = torch.arange(sample.numel()).view(sample.shape)
    pairs = []
    for t in range(len(sample)):
        first = max(0, t - ball.largest_shift)
        last = min(len(sample) - 1, t + ball.largest_shift)
        for to in range(first, last + 1):
            possible = (sample[t] > 0) & ((sample[to] == 0) | ball.counts)
            if t != to:
                pairs.append(torch.stack([numbers[t][possible], numbers[to][possible]], 1))
    places = torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.int64)
    return places, torch.tensor([-1.0, 1.0], dtype=sample.dtype).expand(places.shape)


def _values(part: Tensor) -> Values:
    """Places and values of all that is not 0."""
    places = part.nonzero()
    values = part[tuple(places.unbind(1))]
    rows = zip(places.tolist(), values.tolist(), strict=True)
    return [[*place, round(value, 6)] for place, value in rows]
