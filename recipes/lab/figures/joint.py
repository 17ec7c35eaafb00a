"""Numbers of the figure of joint bounds: trains of a neuron, bounds of its count, what each part
proves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sj_robust import SpikingClassifier
from sj_robust.core.host import neuron
from sj_robust.core.preserved import full_precision
from sj_robust.core.saved import SavedResult
from sj_robust.neuron.charging import Neuron, find_neurons
from sj_robust.ops.trains.config import StepBounds
from sj_robust.proofs.bounds import BoundedRun, bounded_logits, bounded_neurons
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.rules import Bounds
from sj_robust.proofs.spiking import Float32Spiking, Interval, LayerBounds
from sj_robust.proofs.windows import ListedTrains, possible_trains

__all__ = ["JointBounds", "joint_bounds", "proved_by_parts"]

_STEPS = 8
"""Time steps of the neuron."""
_CURRENT = 1.6
"""Current around which spikes are counted."""
_LARGEST = 4.0
"""Largest current whose train is shown."""
_BATCH = 60


@dataclass(frozen=True)
class JointBounds(
    SavedResult, what="the numbers of a figure", format="sj_robust.figure.joint", version=1
):
    """What joint bounds are made of, and what each part proves.

    Attributes:
        trains: Pieces of the currents from 0 to 4 of a LIF neuron: ends of ``current`` and
            ``spikes`` of each.
        counts: By ``radius`` of the current around 1.6, the ``least`` and ``most`` number of spikes
            by ``intervals`` and by the ``chain``.
        proved: By network and part, the share of images in per cent that the part proves with those
            before it, at the radii ``eps``.
    """

    trains: list[dict[str, list[float]]]
    counts: dict[str, list[float]]
    proved: dict[str, dict[str, list[float]]]


class _Apart(JointRun):
    """Joint bounds whose logits are of single spikes."""

    def lead(self, logits: Bounds, y: Tensor) -> Tensor:
        return BoundedRun.lead(self, logits, y)


class _OnlyTrains(_Apart):
    """The same without windows."""

    def windowed(self, name: str, found: StepBounds) -> Tensor:
        return torch.zeros(0, dtype=torch.int64, device=found.sure.device)


def joint_bounds(
    networks: Mapping[str, SpikingClassifier],
    x: Tensor,
    y: Tensor,
    eps: Mapping[str, Sequence[float]],
) -> JointBounds:
    """The numbers of the figure, with what is proved of each network at its radii."""
    neurons, _, _ = find_neurons(nn.Sequential(neuron.LIFNode(tau=2.0)))
    lif = neurons["0"]
    spiking = Float32Spiking(lif, LayerBounds())
    table = possible_trains(
        spiking, _STEPS, largest=_LARGEST, error=1e-7, device=torch.device("cpu")
    )
    assert table is not None  # the trains of a LIF neuron can be listed
    return JointBounds(
        trains=_pieces(table),
        counts=_counts(lif, table),
        proved={name: _proved(model, x, y, eps[name]) for name, model in networks.items()},
    )


def _pieces(table: ListedTrains) -> list[dict[str, list[float]]]:
    """Pieces of the currents with one train each, except for pieces that are too short to see."""
    pieces = []
    for low, high, spikes in zip(table.low, table.high, table.spikes, strict=True):
        ends = [max(float(low), 0.0), min(float(high), _LARGEST)]
        if ends[1] - ends[0] > 1e-5:
            pieces.append({"current": ends, "spikes": spikes.tolist()})
    return pieces


def _counts(lif: Neuron, table: ListedTrains) -> dict[str, list[float]]:
    """Bounds of the number of spikes, by single spikes (intervals) and by possible trains
    (chain).
    """
    radius = torch.linspace(0.0, _CURRENT / 2, 81, dtype=torch.float64)
    current = Interval(_CURRENT - radius, _CURRENT + radius)
    chain = table.chain(current).bounds(torch.ones(1, _STEPS, dtype=torch.float64))
    per_step = Interval(current.low.expand(_STEPS, -1), current.high.expand(_STEPS, -1))
    spikes = Float32Spiking(lif, LayerBounds()).run(per_step)
    return {
        "radius": radius.tolist(),
        "intervals least": spikes.low.sum(0).tolist(),
        "intervals most": spikes.high.sum(0).tolist(),
        "chain least": chain.low[0].tolist(),
        "chain most": chain.high[0].tolist(),
    }


def _proved(
    model: SpikingClassifier, x: Tensor, y: Tensor, eps: Sequence[float]
) -> dict[str, list[float]]:
    """Radii, and by part the share that it proves at each of them."""
    found: dict[str, list[float]] = {"eps": list(eps)}
    for size in eps:
        for part, share in proved_by_parts(model, x, y, size).items():
            found.setdefault(part, []).append(share)
    return found


def proved_by_parts(model: SpikingClassifier, x: Tensor, y: Tensor, eps: float) -> dict[str, float]:
    """Share of images in per cent that intervals prove, and that every further part does.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), neuron.IFNode(step_mode="m"))
        >>> _ = net[0].weight.data.copy_(torch.eye(2))
        >>> model = SpikingClassifier(net, T=4).eval()
        >>> proved_by_parts(model, torch.tensor([[0.9, 0.1]]), torch.tensor([0]), 0.1)
        {'intervals': 0.0, '+ trains': 0.0, '+ windows': 0.0, '+ counts': 100.0}
    """
    neurons = bounded_neurons(model)
    bounded = partial(bounded_logits, model)
    verified = dict.fromkeys(("intervals", "+ trains", "+ windows", "+ counts"), 0)
    with full_precision(x.device):
        over_time = OverTime(Maps(bounded, neurons, x[0]), model.T)
        for images, labels in zip(torch.split(x, _BATCH), torch.split(y, _BATCH), strict=True):
            size = len(images)
            runs = {
                "intervals": BoundedRun(neurons, size),
                "+ trains": _OnlyTrains(neurons, size, over_time=over_time),
                "+ windows": _Apart(neurons, size, over_time=over_time),
                "+ counts": JointRun(neurons, size, over_time=over_time),
            }
            for part, run in runs.items():
                lead = run.lead(bounded(run, images, eps), labels)
                worst = lead.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
                verified[part] += int((worst < 0).sum())
    return {part: 100.0 * number / len(x) for part, number in verified.items()}
