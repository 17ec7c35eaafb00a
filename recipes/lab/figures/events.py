"""Event frames before and after an attack, and the events that a proof leaves open: numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel
from sj_robust.core.saved import SavedResult
from sj_robust.evaluation.report.verdict import budget
from sj_robust.proofs.moves import EVENTS
from sj_robust.proofs.open_events import open_events
from sj_robust.proofs.verification import NormName, ball_of
from sj_robust.training.modes import event_attacks

Values = list[list[float]]
"""Places, each frame, polarity, y and x, with the value there at the end."""


@dataclass(frozen=True)
class EventPictures(
    SavedResult, what="the numbers of a figure", format="sj_robust.figure.events", version=1
):
    """One sample of event frames, attacked, and what linear bounds leave open.

    Attributes:
        network: Name of the network.
        threat: The budget, in words.
        shape: [T, polarities, height, width].
        label: The class.
        seen: The class that the network sees in the clean frames and in the attacked ones.
        clean: Number of events of every value that has some: frame, polarity, y, x and number.
        attacked: The same after the attack.
        falls: How far a change or a move of each value lowers the bound of the lead, where it does:
            frame, polarity, y, x and the fall; see :func:`sj_robust.proofs.open_events`.
        open_values: Values that the bounds do not rule out, without a number.
        margin: What the bounds say the right class leads by at least.
    """

    network: str
    threat: str
    shape: list[int]
    label: int
    seen: list[int]
    clean: Values
    attacked: Values
    falls: Values
    open_values: Values
    margin: float


def event_pictures(
    name: str, model: SpikingClassifier, x: Tensor, y: Tensor, threat: ThreatModel
) -> EventPictures:
    """The first of some samples that the attack fools, or else the first that is right.

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
    number = int((seen != y).int().argmax())
    sample, label = x[number : number + 1], y[number : number + 1]
    norm: NormName = "L0" if threat.norm == "L0" else "moves"
    ball = ball_of(norm, threat.eps, threat.largest_shift, counts=threat.counts)
    assert isinstance(ball, EVENTS)
    found = open_events(model, sample, label, ball)
    return EventPictures(
        network=name,
        threat=budget(threat),
        shape=list(sample.shape[1:]),
        label=int(label),
        seen=[int(label), int(seen[number])],
        clean=_values(sample[0]),
        attacked=_values(x_adv[number]),
        falls=_values(found.falls[0]),
        open_values=_values(found.is_open[0].float()),
        margin=float(found.margin[0]),
    )


def _values(part: Tensor) -> Values:
    """Places and values of all that is not 0."""
    places = part.nonzero()
    values = part[tuple(places.unbind(1))]
    rows = zip(places.tolist(), values.tolist(), strict=True)
    return [[*place, round(value, 6)] for place, value in rows]
