"""FAB: steps onto the plane that replaces the decision boundary, each of them near the image."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sj_robust.attacks.call import (
    Best,
    Model,
    Randomness,
    checked_copies,
    crafting,
    input_gradient,
    lowest_loss,
)
from sj_robust.attacks.logits import likeliest_wrong, of_class
from sj_robust.attacks.projection import Norm, per_sample, wide
from sj_robust.attacks.threat import ThreatModel, ball_threat, random_point
from sj_robust.core.checks import logits_of
from sj_robust.core.randomness import Private

_BACKWARD = 0.9  # beta of the paper: how much of the perturbation is kept after a success
_LARGEST_BIAS = 0.1  # alpha_max of the paper: largest weight of the image itself
_OVERSHOOT = 1.05  # eta of the paper: how far a step goes, in steps onto the plane
_SHORTEST = 1e-8  # two steps of length 0 have no ratio


def fab(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: Norm = "Linf",
    steps: int = 100,
    restarts: int = 1,
    target_classes: int | None = None,
    generator: Randomness = None,
) -> Tensor:
    """Fast adaptive boundary attack: looks for the nearest image that fools the model.

    Equation: with ``p(z)`` the point of the box on the plane ``f_c(x[k]) - f_y(x[k]) + <w, z -
    x[k]> = 0``, ``w = grad (f_c - f_y)``, that is nearest to z, and ``d = p(x[k]) - x[k]``, ``e =
    p(x) - x``, ``x[k+1] = clamp((1 - a) (x[k] + 1.05 d) + a (x + 1.05 e), 0, 1)`` with ``a =
    min(||d|| / (||d|| + ||e||), 0.1)``. An image that fools is kept if it is the nearest so far,
    and the search goes on at ``x + 0.9 (x[k+1] - x)``. The class c is the one whose plane is
    nearest to ``x[k]``. Restarts begin on the border of the ball of half the radius.

    A sample leaves as soon as an image within ``eps`` fools the model; where none does, the result
    is ``x``. Other arguments, result and errors are those of :mod:`sj_robust.attacks`.

    Args:
        target_classes: Number of the likeliest wrong classes at ``x``, each of which is c of runs
            of its own; None for the nearest of all classes at every step.

    Source: Croce and Hein, Minimally distorted adversarial examples (ICML 2020), algorithm 1 and
        equations 5 to 8; settings and targets of AutoAttack.
    """
    ball = ball_threat(norm, eps)
    x, y = checked_copies(model, x, y, generator)
    if x.numel() == 0:
        return x
    with crafting(model, x.device, generator) as private:
        with torch.no_grad():
            logits = logits_of(model, x, y)
        best = Best(x)
        best.fooled = logits.argmax(1) != y
        for classes in _towards(logits, y, target_classes):
            for start in _starts(x, ball, restarts, private):
                rows = best.standing()
                if len(rows) == 0:
                    return best.x_adv
                boundary = _Boundary(
                    model=model,
                    x=x[rows],
                    y=y[rows],
                    classes=classes[rows],
                    ball=ball,
                )
                x_adv = ball.project(x[rows], boundary.nearest(start[rows], steps))
                fooled = boundary.fooled(x_adv, y[rows])
                best.offer(rows, x_adv, best.loss[rows], fooled)
    return best.x_adv


@dataclass(frozen=True)
class _Boundary:
    """Where samples [N] change from their label to one of their other classes."""

    model: Model
    x: Tensor
    y: Tensor
    classes: Tensor
    """The other classes, [N, K]."""
    ball: ThreatModel

    def nearest(self, start: Tensor, steps: int) -> Tensor:
        """The image nearest to that of each sample that fooled the model; ``x`` without one."""
        x = wide(self.x)
        nearest = x.clone()
        distance = -lowest_loss(x)
        rows = torch.arange(len(x), device=x.device)  # samples without an image in the ball
        here = wide(start)
        for _ in range(steps):
            lead, normal = self._plane(here, rows)
            here = _step(
                here,
                x[rows],
                lead,
                normal,
                self.ball.ball,
            )
            fooled = self.fooled(here, self.y[rows])
            away = self.ball.distance(x[rows], here)
            nearer = fooled & (away < distance[rows])
            nearest[rows[nearer]] = here[nearer]
            distance[rows[nearer]] = away[nearer]
            back = x[rows] + _BACKWARD * (here - x[rows])
            here = torch.where(per_sample(fooled, here), back, here)
            outside = distance[rows] > self.ball.eps
            rows = rows[outside]
            here = here[outside]
            if len(rows) == 0:
                break
        return nearest

    @torch.no_grad()
    def fooled(self, images: Tensor, y: Tensor) -> Tensor:
        """Whether the model is wrong about the images, [N] bool."""
        return self._logits(images, y).argmax(1) != y

    def _logits(self, images: Tensor, y: Tensor) -> Tensor:
        return logits_of(self.model, images.to(self.x.dtype), y)

    def _plane(self, here: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Lead [N] of the class whose plane is nearest over the label, and its gradient [N, D]."""
        here = here.detach().requires_grad_()
        y = self.y[rows]
        logits = self._logits(here, y)
        others = logits.gather(1, self.classes[rows])
        leads = others - of_class(logits, y)[:, None]
        gradients = [input_gradient(lead, here, keep_graph=True) for lead in leads.unbind(1)]
        normals = torch.stack(gradients, 1).flatten(2)
        leads = leads.detach().to(normals.dtype)
        dual = 1 if self.ball.norm == "Linf" else 2
        slope = torch.linalg.vector_norm(normals, dual, dim=2)
        away = leads.abs() / (slope + 1e-12)
        nearest = away.argmin(1)
        sample = torch.arange(len(here), device=here.device)
        return leads[sample, nearest], normals[sample, nearest]


def shortest_step(
    points: Tensor,
    lead: Tensor,
    normal: Tensor,
    norm: Norm,
) -> Tensor:
    """Shortest steps [N, D] within the box that bring the points [N, D] to ``lead + <normal, step>
    = 0``, or as near to it as the box allows.

    Equation: element i goes ``min(l v_i, room_i)`` in the direction that closes the gap, with
    ``v_i = 1`` in Linf and ``|normal_i|`` in L2; ``l`` is the smallest for which ``sum |normal_i|
    min(l v_i, room_i) = |lead|``.

    Source: Croce and Hein, Minimally distorted adversarial examples (ICML 2020), section 2.
    """
    scale = normal.abs().amax(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    weight = normal.abs() / scale
    gap = lead.abs()[:, None] / scale
    side = torch.where(lead < 0, -1, 1)
    way = -normal.sign() * side[:, None]
    room = torch.where(way > 0, 1 - points, points)
    speed = weight if norm == "L2" else way.abs()
    time = torch.where(speed > 0, room / speed, torch.inf)  # when an element meets the box
    time, order = time.sort(dim=1)
    ended = (weight * room).gather(1, order)
    rate = (weight * speed).gather(1, order)
    before = ended.cumsum(1) - ended  # gained by the elements that met it earlier
    going = rate.flip(1).cumsum(1).flip(1)  # gained per unit of time by the others
    many = (before + time * going < gap).sum(1, keepdim=True)
    many = many.clamp(max=points.shape[1] - 1)
    missing = gap - before.gather(1, many)
    length = missing / going.gather(1, many)
    moved = torch.minimum(length.clamp(min=0) * speed, room)
    return torch.where(speed > 0, way * moved, 0.0)


def _step(
    here: Tensor,
    x: Tensor,
    lead: Tensor,
    normal: Tensor,
    norm: Norm,
) -> Tensor:
    """The next image: a step beyond the plane from here, drawn towards one from the image."""
    points = here.flatten(1)
    images = x.flatten(1)
    lead_at_image = lead + (normal * (images - points)).sum(1)
    step = shortest_step(points, lead, normal, norm)
    step_of_image = shortest_step(images, lead_at_image, normal, norm)
    length = _length(step, norm)
    bias = length / (length + _length(step_of_image, norm))
    bias = bias.clamp(max=_LARGEST_BIAS)[:, None]
    beyond = (1 - bias) * (points + _OVERSHOOT * step)
    beyond = beyond + bias * (images + _OVERSHOOT * step_of_image)
    return beyond.clamp(0, 1).view_as(here)


def _length(step: Tensor, norm: Norm) -> Tensor:
    order = torch.inf if norm == "Linf" else 2
    length: Tensor = torch.linalg.vector_norm(step, order, dim=1)
    return length.clamp(min=_SHORTEST)


def _towards(logits: Tensor, y: Tensor, target_classes: int | None) -> list[Tensor]:
    """The classes [N, K] of every run."""
    wrong = likeliest_wrong(logits, y, logits.shape[1] - 1)
    if target_classes is None:
        return [torch.stack(wrong, 1)]
    return [target[:, None] for target in wrong[:target_classes]]


def _starts(
    x: Tensor,
    ball: ThreatModel,
    restarts: int,
    private: Private,
) -> Iterator[Tensor]:
    """The images themselves, then points on the border of the ball of half the radius."""
    yield x
    half = ThreatModel(ball.ball, ball.eps / 2)
    for _ in range(restarts - 1):
        yield random_point(x, half, private, on_border=True)
