"""The events of a sample that may be part of an adversarial set, according to a proof."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.environment import device_of
from sj_robust.core.preserved import preserved, sums_of_products
from sj_robust.proofs.branching import Prover, leads
from sj_robust.proofs.constants import parameters_kept_in_float64
from sj_robust.proofs.joint import OverTime
from sj_robust.proofs.logits import bounded_logits, bounded_neurons
from sj_robust.proofs.moves import Events
from sj_robust.proofs.relaxation import Maps, raised
from sj_robust.proofs.verification import ball_of_frames

__all__ = ["OpenEvents", "open_events"]

_TURNS = 20
"""Turns of gradient ascent on the slopes, as in ``verify``."""


@dataclass(frozen=True)
class OpenEvents:
    """What linear bounds say of the events of samples [N, T, *]. 未定事件。

    Attributes:
        margin: What the right class leads by at least, [N].
        falls: How far one change of each value, or one move of each event, lowers the bound of the
            lead over the rival with the smallest margin, [N, T, *].
        is_open: Whether a value or event lowers a bound and is part of a set of changes of which no
            bound rules out that it breaks the sample, [N, T, *].
    """

    margin: Tensor
    falls: Tensor
    is_open: Tensor


@parameters_kept_in_float64()
def open_events(model: SpikingClassifier, x: Tensor, y: Tensor, ball: Events) -> OpenEvents:
    """The events that a proof leaves open. 证明未排除的事件。

    Equation: back-substitution bounds the lead over a rival on the whole ball by a linear function,
    ``lead(x~) >= c + w x~``. With f[i] what a change of value i, or a move of event i, lowers it by
    at most, and k the budget, event i is *ruled out* if for every rival::

        c + w x > f[i] + the k - 1 largest f[j] of the others

    since then no set of k changes of which i is one breaks the sample. All others are open, except
    for those that lower no bound, f[i] = 0. A sample that these bounds prove has no open event.

    Args:
        model: A classifier in evaluation mode.
        x: Event frames [N, T, *].
        y: Labels [N] int64.
        ball: Changes or moves of the frames.

    Raises:
        NotImplementedError: If something in the network has no bounds; it is named.
        ValueError: If the frames do not fit the ball.

    Source: linear relaxation as in ``verify(..., method="crown")``.

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> from sj_robust.classifier import SpikingEventClassifier
        >>> from sj_robust.proofs.flips import Flips
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Flatten(2),
        ...     torch.nn.Linear(3, 2),
        ...     neuron.IFNode(step_mode="m"),
        ...     torch.nn.Linear(2, 2),
        ... )
        >>> _ = net[1].weight.data.copy_(torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
        >>> _ = net[1].bias.data.zero_()
        >>> _ = net[3].weight.data.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        >>> _ = net[3].bias.data.copy_(torch.tensor([0.0, 1.0]))
        >>> model = SpikingEventClassifier(net, T=1).eval()
        >>> x = torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 3, 1, 1)
        >>> found = open_events(model, x, torch.tensor([0]), Flips(1))
        >>> found.is_open.flatten()  # either of the first two breaks it, the third one does nothing
        tensor([ True,  True, False])
    """
    ball = ball_of_frames(ball, x)
    device = device_of(model)
    neurons = bounded_neurons(model)
    margins = []
    falls = []
    is_open = []
    model.find_convention(x.to(device))
    with sums_of_products(device), preserved(model):
        maps = Maps(partial(bounded_logits, model), neurons, x[0].to(device))
        prover = Prover(logits=model, maps=maps, eps=ball, over_time=OverTime(maps, model.T))
        images = torch.split(x.to(device), 1)
        labels = torch.split(y.to(device), 1)
        for image, label in zip(images, labels, strict=True):
            found = _open_of_one(prover, image, label, ball)
            margins.append(found.margin)
            falls.append(found.falls)
            is_open.append(found.is_open)
    return OpenEvents(
        margin=torch.stack(margins),
        falls=torch.stack(falls),
        is_open=torch.stack(is_open),
    )


def _open_of_one(prover: Prover, image: Tensor, label: Tensor, ball: Events) -> OpenEvents:
    """The same of one sample [1, T, *], without a dimension of samples."""
    run = prover.run(image)
    weights = leads(label, run.error.shape[1])[0]
    rows = torch.zeros(len(weights), dtype=torch.long, device=image.device)
    found = raised(prover.maps, run, rows, weights, rounds=_TURNS)
    assert run.changed is not None
    changes = run.changed.changes
    assert changes is not None
    with torch.no_grad():
        frames = image.double()
        spent = changes.falls(rows, found.weights).sum(1)
        own = ball.falls(frames, found.weights)
        times = ball.times(frames, found.weights)
        of_each = own.flatten(1)
        worst = worst_with(of_each, times.flatten(1), int(ball.budget))
        value = found.value.detach()
        at_frames = (value + spent).unsqueeze(1)
        breaks = ~(at_frames > worst)  # NaN rules out nothing
    margin = value.min()
    lowers = (own > 0).flatten(1).any(0)
    is_open = breaks.any(0) & lowers & ~(margin > 0)
    least = int(value.argmin())
    return OpenEvents(margin, own[least], is_open.view_as(own[0]))


def worst_with(falls: Tensor, times: Tensor, budget: int) -> Tensor:
    """The largest sum of so many falls [R, D] of which each one is a part, [R, D]; each can be
    taken ``times`` [R, D].
    """
    counts = range(1, max(1, budget) + 1)
    every = [falls * (times >= number) for number in counts]
    available = torch.cat(every, 1)
    count = min(budget, available.shape[1])
    if count == 0:
        return torch.zeros_like(falls)
    largest = available.topk(count, 1).values
    others = largest[:, :-1].sum(1, keepdim=True)
    return others + torch.minimum(falls, largest[:, -1:])
