"""Proofs batch by batch, each checked against the network itself."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.checks import check_logits
from sj_robust.core.environment import device_of
from sj_robust.core.preserved import RandomNumbers, preserved, sums_of_products
from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.mip import Programs
from sj_robust.proofs.moves import Events
from sj_robust.proofs.points import Points
from sj_robust.proofs.program import Program
from sj_robust.proofs.soundness import (
    UnprovableError,
    UnsoundBoundsError,
    check_kept,
    check_run,
    check_stated,
    check_surrogates,
    check_unchanged,
)

__all__ = ["METHODS", "BatchProofs", "BoundedLayer", "Method"]

Method = Literal["ibp", "joint", "mip"]
METHODS = get_args(Method)


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
        neurons: Its spiking layers, from :func:`~sj_robust.proofs.bounds.bounded_neurons`.
        ball: Linf radius, or what may happen to event frames.
        x: The first images, with which the network is looked at; they are not proved.
        y: Their labels.
        method: How, as for :func:`~sj_robust.proofs.verify`.
        time_limit: Seconds per image for mip.

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
        self._time_limit = time_limit
        self._device = device_of(model)
        self._points = Points(model, ball)
        self._over_time: OverTime | None = None
        self._programs: Programs | None = None
        maps = Maps(model, neurons, x[0].to(self._device))
        self._bounded = maps.bounded
        self._program = maps.program
        self.size = len(x)
        with sums_of_products(self._device), preserved(model):
            images, labels = x.to(self._device).clone(), y.to(self._device).clone()
            self.classes = _classes(model, images, labels)
            check_stated(neurons, model.T, images)
            self._kept = check_kept(model, images)
            maps.structure()
            check_surrogates(model.net, neurons, images)
            if method != "ibp":
                self._over_time = OverTime(maps, model.T)
                self.size = min(self.size, self._over_time.images)
                if method == "mip":
                    self._programs = Programs(self._over_time, self._points)
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
            run = self._run(len(images))
            bounds = self._bounded(run, images, self._ball)
            logits = check_run(self._model, run, bounds, images)
            wrong = logits.argmax(1) != labels
            self._apart = run.apart
            lead = run.lead(bounds, labels)
            margin = -lead.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
            broken = wrong.clone()
            x_adv = images.clone()
            if self._programs is not None:
                for n in (~(margin > 0) & ~wrong).nonzero().squeeze(1).tolist():  # NaN is no proof
                    part = slice(n, n + 1)
                    lead_of_one, point = self._programs.decided(
                        images[part], labels[part], self._time_limit
                    )
                    margin[n] = max(float(margin[n]), lead_of_one)
                    if point is not None:
                        broken[n] = True
                        x_adv[part] = point
            _check_margins(logits, labels, margin, first=done)
            check_unchanged(self._model, self._kept)  # what all forwards of the proofs left
        self.correct += (~wrong).tolist()
        self.margins += margin.tolist()
        self.broken += broken.tolist()
        self.x_adv.append(x_adv.detach().to(x))
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

    def program(self) -> Program:
        """The network's program for two images."""
        return self._program()

    @property
    def stepwise(self) -> tuple[str, ...]:
        """Layers whose bounds are not joint over time, with the reason."""
        return () if self._over_time is None else self._over_time.stepwise

    @property
    def apart(self) -> tuple[str, ...]:
        """Layers that bound changed events as if some had budgets of their own, with the reason."""
        return tuple(f"{name}: {reason}" for name, reason in self._apart.items())

    def _run(self, samples: int) -> BoundedRun:
        """A run of intervals, or of joint bounds if it is known how the network treats time."""
        if self._over_time is None:
            return BoundedRun(self._spiking, samples)
        return JointRun(self._spiking, samples, over_time=self._over_time)


def _classes(model: SpikingClassifier, images: Tensor, labels: Tensor) -> int:
    """Number of the network's logits, if it draws no random numbers."""
    numbers = RandomNumbers(model, images.device)
    with torch.no_grad():
        logits = check_logits(model(images.clone()), labels)
    if numbers.drawn():
        raise UnprovableError(
            "model must give the same logits in every forward, got one that draws random numbers "
            "inside"
        )
    if logits.shape[1] < 2:
        raise UnprovableError("model must distinguish at least 2 classes, got 1 logit")
    return logits.shape[1]


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
            f"and yet the network's lead at the image itself is {float(lead[number]):.3g}: the "
            "bounds have a bug, or the network has a state that its reset leaves; please report "
            "it with the network"
        )
