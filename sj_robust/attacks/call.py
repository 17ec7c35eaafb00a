"""How an attack calls a model: state left as found, every answer checked."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sj_robust.attacks._resets import refuse_carried_states
from sj_robust.core.checks import (
    check_images,
    check_labels,
    check_model,
    is_checked,
    logits_of,
)
from sj_robust.core.preserved import evaluation_mode
from sj_robust.core.randomness import (
    Private,
    SampleDraws,
    SampleSeeds,
    check_seeds,
    draw_seed,
    private_generator,
    seeded_globals,
)

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Randomness = torch.Generator | SampleSeeds | None
"""What seeds one call of an attack; None draws fresh numbers."""


class Attack(Protocol):
    """An attack with its budget already given, such as ``functools.partial(fgsm, eps=0.1)``.
    攻击的统一接口。

    Whoever runs attacks (training, evaluation, a suite) calls this; a class or function of your own
    with these arguments is one. With ``SampleSeeds`` what it draws for a sample should depend on
    neither neighbours nor batch.
    """

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, generator: Randomness = None
    ) -> Tensor:
        """Perturbed images in shape, dtype and device of ``x``."""


@contextmanager
def crafting(model: Model, device: torch.device, generator: Randomness) -> Iterator[Private]:
    """Evaluation mode, gradients on, private randomness (yielded); all of it undone afterwards."""
    private = private_generator(generator, device)
    try:
        with (
            evaluation_mode(model),
            # An inference tensor can take part in no graph, so enable_grad alone does not serve
            # every caller.
            torch.inference_mode(False),
            torch.enable_grad(),
            seeded_globals(draw_seed(private), device),
            refuse_carried_states(model),
        ):
            yield private
    finally:
        # weights cast without a graph would lose the caller's gradients
        torch.clear_autocast_cache()


@contextmanager
def isolated(model: Model, x: Tensor, generator: Randomness) -> Iterator[Private]:
    """As ``crafting``; foreign code inside also leaves all other global generators, ``.grad`` and
    flags alone.
    """
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    kept = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    # what other packages draw from
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    # torch's own
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if initialized else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            crafting(model, x.device, generator) as private,
        ):
            seed = draw_seed(private)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002  as above
            for parameter in parameters:
                parameter.grad = None
            yield private
    finally:
        for parameter, grad, requires_grad in kept:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002  as above


def seeds_of_samples(private: Private, samples: int, seed: int) -> SampleSeeds:
    """The seeds that the caller gave, or else some derived from ``seed``."""
    if isinstance(private, SampleDraws):
        return private.seeds
    return SampleSeeds(range(samples)).derived(seed)


class ImageScores(NamedTuple):
    """How good images are for the attacker, per sample."""

    loss: Tensor
    """What the attack maximises, [N]: the loss, or its negative for a targeted attack."""
    fooled: Tensor
    """Whether the attack has reached its goal, [N] bool."""
    logits: Tensor
    """What the verdict rests on, the mean of the forwards, [N, classes]."""


class _NonFiniteGradientError(FloatingPointError, ValueError):
    """A wrong value, which a training in full precision answers for itself."""


@dataclass(frozen=True)
class Objective:
    """What a gradient attack climbs: per-sample loss of the model, averaged over ``eot_samples``
    forwards.
    """

    model: Model
    loss: Loss | None = None
    targeted: bool = False
    eot_samples: int = 1

    def gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, ImageScores]:
        """Gradient of the loss of every sample with respect to its image, and the score at
        ``x``.
        """
        x = x.detach().requires_grad_()
        grad = torch.zeros_like(x)
        scores = []
        for _ in range(self.eot_samples):
            logits, losses = self._forward(x, y)
            grad += input_gradient(losses, x)
            scores.append((logits.detach(), losses.detach()))
        return grad / self.eot_samples, self._score(scores, y)

    @torch.no_grad()
    def score(self, x: Tensor, y: Tensor) -> ImageScores:
        """Score at ``x`` without a gradient."""
        scores = [self._forward(x, y) for _ in range(self.eot_samples)]
        return self._score(scores, y)

    def _forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(self.model, x, y)
        loss = _cross_entropy if self.loss is None else self.loss
        losses = loss(logits, y)
        if losses.shape != y.shape:
            raise ValueError(
                f"loss must return one value per sample, [{y.shape[0]}], got "
                f"{list(losses.shape)}; use reduction='none'"
            )
        return logits, -losses if self.targeted else losses

    def _score(self, scores: list[tuple[Tensor, Tensor]], y: Tensor) -> ImageScores:
        logits = torch.stack([score[0] for score in scores]).mean(0)
        losses = torch.stack([score[1] for score in scores]).mean(0)
        fooled = (logits.argmax(1) == y) == self.targeted
        return ImageScores(losses, fooled, logits)


def lowest_loss(x: Tensor) -> Tensor:
    """What every loss beats, per sample."""
    return x.new_full(x.shape[:1], -torch.inf, dtype=torch.float64)


class Best:
    """Best image so far per sample: one that fools before one that does not, then the higher
    loss.
    """

    def __init__(self, x: Tensor) -> None:
        """Begin with the images themselves."""
        self.x_adv = x.clone()
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.loss = lowest_loss(x)

    def offer(
        self,
        rows: Tensor,
        x_adv: Tensor,
        loss: Tensor,
        fooled: Tensor,
    ) -> None:
        """Take the images of the samples ``rows`` that beat what is kept."""
        kept_fooled = self.fooled[rows]
        higher = (fooled == kept_fooled) & (loss > self.loss[rows])
        better = (fooled & ~kept_fooled) | higher
        rows = rows[better]
        self.x_adv[rows] = x_adv[better]
        self.fooled[rows] = fooled[better]
        self.loss[rows] = loss[better].double()

    def standing(self) -> Tensor:
        """Indices of the samples that no image has fooled."""
        return (~self.fooled).nonzero().squeeze(1)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y, reduction="none")


def checked_copies(
    model: Model, x: Tensor, y: Tensor, generator: Randomness
) -> tuple[Tensor, Tensor]:
    """Entry check of every gradient attack; copies that the model may keep and that have no
    graph.
    """
    if not is_checked():
        check_model(model)
        check_images(x)
        check_labels(y, x)
    check_seeds(generator, x)
    with torch.inference_mode(False):
        return x.detach().clone(), y.clone()


def input_gradient(losses: Tensor, x: Tensor, *, keep_graph: bool = False) -> Tensor:
    """Gradient of the summed losses; the sum keeps samples apart and does not shrink with N."""
    grad = None
    if losses.requires_grad:
        total = losses.sum()
        (grad,) = torch.autograd.grad(total, x, retain_graph=keep_graph, allow_unused=True)
    if grad is None:
        raise RuntimeError(
            "no gradient reaches the images: model and loss must be differentiable, without "
            "detach or no_grad inside; neurons of SpikingJelly 0.0.0.0.14 have no gradient in "
            "evaluation mode, so wrap a spiking network in SpikingClassifier(net, T=...)"
        )
    if not bool(torch.isfinite(grad).all()):
        raise _NonFiniteGradientError(
            "the gradient at the images must be finite, got NaN or infinity; craft in float32"
        )
    return grad
