"""Proofs batch by batch, each checked against the network itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Literal, get_args

import torch
from torch import Tensor

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.checks import check_logits
from sj_robust.core.environment import device_of
from sj_robust.core.preserved import RandomNumbers, preserved, sums_of_products
from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.branching import Prover, Searched
from sj_robust.proofs.exact import Matrices, mip
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.logits import bounded_logits
from sj_robust.proofs.moves import Events
from sj_robust.proofs.relaxation import Maps
from sj_robust.proofs.soundness import (
    UnprovableError,
    UnsoundBoundsError,
    WatchedJointRun,
    WatchedRun,
    check_kept,
    check_maps,
    check_neurons,
    check_point,
    check_surrogates,
)

__all__ = ["METHODS", "BatchProofs", "BoundedLayer", "Method"]

Method = Literal["ibp", "joint", "crown", "bab", "mip"]
METHODS = get_args(Method)
_SearchAll = Callable[[Tensor, Tensor], Searched]


@dataclass(frozen=True)
class BoundedLayer:
    """Bounds of a spiking layer, averaged over images and neurons. 脉冲层的上下界。

    Attributes:
        name: Name of the layer in the network.
        undecided: Share of spikes, per time step, that the bounds do not decide.
        potential: Mean square, per time step, of the distance between the bounds of the charged
            potential h: no perturbation in the ball moves it by more, resets and rounding included.
    """

    name: str
    undecided: tuple[float, ...]
    potential: tuple[float, ...]


class BatchProofs:
    """Proves images batch by batch and keeps what it finds. 分批证明。

    Args:
        model: The classifier.
        neurons: Its spiking layers, from :func:`~sj_robust.proofs.logits.bounded_neurons`.
        ball: Linf radius, or what may happen to event frames.
        x: The first images, with which the network is looked at; they are not proved.
        y: Their labels.
        method: How, as for :func:`~sj_robust.proofs.verify`.
        time_limit: Seconds per image for bab and mip.

    Attributes:
        size: Largest number of images at a time.
        classes: Number of logits.
        correct: Whether the network classifies an image correctly, for every image so far.
        margins: What its class leads by at least.
        broken: Whether a point of its ball is misclassified.
        x_adv: That point, or the image, in batches.
    """

    def __init__(
        self,
        model: SpikingClassifier,
        neurons: dict[str, Neuron],
        ball: float | Events,
        x: Tensor,
        y: Tensor,
        *,
        method: Method,
        time_limit: float,
    ) -> None:
        """Check the network on its first images, and find out how it treats time.

        Raises:
            UnprovableError: If it is not one function of its images that bounds are known of.
            UnsoundBoundsError: If it contradicts its bounds.
            NotImplementedError: If something in it has no bounds.
        """
        self._model = model
        self._spiking = neurons
        self._ball = ball
        self._method = method
        self._device = device_of(model)
        maps = Maps(partial(bounded_logits, model), neurons, x[0].to(self._device))
        self._prover = Prover(model, maps, ball)
        by_mip = partial(mip, self._prover, Matrices(maps), time_limit=time_limit)
        searches: dict[str, _SearchAll] = {
            "bab": partial(self._prover.bab, time_limit=time_limit),
            "mip": partial(_one_by_one, by_mip),
        }
        self._search = searches.get(method)
        self.size = len(x)
        with sums_of_products(self._device), preserved(model):
            images, labels = x.to(self._device).clone(), y.to(self._device).clone()
            self.classes = _logits(model, images, labels, runs=2).shape[1]
            check_neurons(neurons, model.T, images)  # runs neurons that a forward leaves out, too
            self._kept = check_kept(model, images)
            maps.check_samples()
            check_maps(maps)
            check_surrogates(model.net, neurons, images)
            if method != "ibp":
                over_time = OverTime(maps, model.T)
                self._prover.over_time = over_time
                self.size = min(self.size, over_time.images)
        self.correct: list[bool] = []
        self.margins: list[float] = []
        self.broken: list[bool] = []
        self.x_adv: list[Tensor] = []
        self._apart: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._sizes = dict.fromkeys(neurons, 0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Prove the next images.

        Raises:
            UnprovableError: If the network draws random numbers or changes in a forward.
            UnsoundBoundsError: If it contradicts its bounds.
            NotImplementedError: If something in it has no bounds.
        """
        done = len(self.correct)
        with sums_of_products(self._device), preserved(self._model):
            images, labels = x.to(self._device).clone(), y.to(self._device).clone()
            logits = _logits(self._model, images, labels, runs=1)
            wrong = logits.argmax(1) != labels
            run = self._run(len(images), watched=not done)
            bounds = bounded_logits(self._model, run, images, self._ball)
            self._apart = run.apart
            lead = run.lead(bounds, labels)
            margin = -lead.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
            batch = _Batch(images, labels, margin=margin, wrong=wrong, x_adv=images)
            if self._method not in ("ibp", "joint"):
                batch = _tightened(batch, self._prover, self._search)
            # layers are looked at in the first batch
            points = islice(self._prover.points(images), 1 if done else None)
            slopes = () if done else self._prover.along_currents(images)
            for point in chain(points, self._prover.against_lead(images), slopes):
                found = check_point(self._model, run, bounds, point)
                _check_margins(found, labels, batch.margin, first=done)
            _check_margins(logits, labels, batch.margin, first=done)
            self._kept.check()  # what all forwards of the proofs left
        self.correct += (~wrong).tolist()
        self.margins += batch.margin.tolist()
        self.broken += batch.wrong.tolist()
        self.x_adv.append(batch.x_adv.detach().to(x))
        for name, layer in run.layers.items():
            self._sizes[name] += layer.neurons
            seen = torch.tensor([layer.undecided, layer.width], dtype=torch.float64)
            self._sums[name] = self._sums.get(name, 0.0) + seen

    @property
    def layers(self) -> tuple[BoundedLayer, ...]:
        """How wide the bounds of every spiking layer are, averaged over images and neurons."""
        return tuple(
            BoundedLayer(name, *map(tuple, (total / self._sizes[name]).tolist()))
            for name, total in self._sums.items()
            if self._sizes[name]
        )

    @property
    def stepwise(self) -> tuple[str, ...]:
        """Layers whose bounds are not joint over time, with the reason."""
        over_time = self._prover.over_time
        return () if over_time is None else over_time.stepwise

    @property
    def apart(self) -> tuple[str, ...]:
        """Layers that bound changed events as if some had budgets of their own, with the reason."""
        return tuple(f"{name}: {reason}" for name, reason in self._apart.items())

    def _run(self, samples: int, *, watched: bool) -> BoundedRun:
        """A run of intervals, or of joint bounds if it is known how the network treats time."""
        over_time = self._prover.over_time
        if over_time is None:
            return (WatchedRun if watched else BoundedRun)(self._spiking, samples)
        return (WatchedJointRun if watched else JointRun)(
            self._spiking, samples, over_time=over_time
        )


def _logits(model: SpikingClassifier, images: Tensor, labels: Tensor, *, runs: int) -> Tensor:
    """Logits of the network, if they are the same in so many runs and nothing is drawn."""
    numbers = RandomNumbers(model, images.device)
    with torch.no_grad():
        logits, *again = (check_logits(model(images.clone()), labels) for _ in range(runs))
    drawn = numbers.drawn()
    if drawn or any(not torch.equal(logits, other) for other in again):
        raise UnprovableError(
            "model must give the same logits in every forward, got one that draws random numbers "
            "inside"
        )
    if logits.shape[1] < 2:
        raise UnprovableError("model must distinguish at least 2 classes, got 1 logit")
    return logits


def _check_margins(logits: Tensor, labels: Tensor, margin: Tensor, *, first: int) -> None:
    """Raise UnsoundBoundsError if the right class of an image leads by less than was proved."""
    right = labels.unsqueeze(1)
    others = logits.double().scatter(1, right, -torch.inf)
    rival = others.amax(1)
    lead = logits.double().gather(1, right).squeeze(1) - rival
    below = ~(lead >= margin)
    if bool(below.any()):
        number = int(below.nonzero()[0])
        raise UnsoundBoundsError(
            f"image {first + number} is proved to keep its class by {float(margin[number]):.3g}, "
            f"and yet the network's lead at a point of its ball is {float(lead[number]):.3g}: the "
            "bounds have a bug, or the network has a state that its reset leaves; please report "
            "it with the network"
        )


@dataclass(frozen=True)
class _Batch:
    """A batch of images and what is known of them.

    Attributes:
        images: The images [N, *].
        labels: Their labels [N].
        margin: What the right class leads by at least, [N].
        wrong: Whether ``x_adv`` is classified wrong, [N].
        x_adv: For an image that is wrong, one of its ball that shows it; otherwise itself.
    """

    images: Tensor
    labels: Tensor
    margin: Tensor
    wrong: Tensor
    x_adv: Tensor

    def open_ones(self) -> list[int]:
        """Numbers of the images that are neither verified nor wrong."""
        proved = self.margin > 0  # NaN is no proof
        found: list[int] = (~proved & ~self.wrong).nonzero().squeeze(1).tolist()
        return found


def _tightened(batch: _Batch, prover: Prover, search: _SearchAll | None) -> _Batch:
    """The batch with what relaxation, and then a search, find of the images that are still open."""
    images = batch.images
    labels = batch.labels
    margin = batch.margin.clone()
    wrong = batch.wrong.clone()
    x_adv = batch.x_adv.clone()
    tighter = replace(batch, margin=margin, wrong=wrong, x_adv=x_adv)
    rest = tighter.open_ones()
    if rest:
        linear = prover.crown(images[rest], labels[rest])
        margin[rest] = torch.maximum(margin[rest], linear)
    rest = tighter.open_ones()
    if search is None or not rest:
        return tighter
    found = search(images[rest], labels[rest])
    margin[rest] = torch.fmax(margin[rest], found.lead)  # NaN is no bound
    for number, point in found.broken.items():
        place = rest[number]
        wrong[place] = True
        x_adv[place] = point[0].to(x_adv)
    return tighter


def _one_by_one(
    search: Callable[[Tensor, Tensor], tuple[float, Tensor | None]], images: Tensor, labels: Tensor
) -> Searched:
    """What a search for single images finds."""
    lead = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=images.device)
    broken = {}
    for i in range(len(images)):
        value, point = search(images[i : i + 1], labels[i : i + 1])
        if point is None:
            lead[i] = value
        else:
            broken[i] = point
    return Searched(lead, broken)
