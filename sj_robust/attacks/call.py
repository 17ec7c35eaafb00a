"""Calls of the attacked model: its state is restored and its output checked."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from sj_robust.attacks.logits import differ
from sj_robust.core.checks import (
    check_images,
    check_labels,
    check_model,
    is_checked,
    is_compiled,
    logits_of,
)
from sj_robust.core.preserved import evaluation_mode, seeded_network
from sj_robust.core.randomness import (
    Private,
    SampleDraws,
    SampleSeeds,
    check_seeds,
    draw_seed,
    private_generator,
)
from sj_robust.core.threat import NormName, l2_norm, per_sample

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Randomness = torch.Generator | SampleSeeds | None
"""What seeds one call of an attack; None draws fresh numbers."""


class Attack(Protocol):
    """An attack with its budget already set, such as ``functools.partial(fgsm, eps=0.1)``.
    攻击的统一接口。

    Training, evaluation and suites call attacks in this way; your own function or class with these
    arguments is one. With ``SampleSeeds``, its random numbers for a sample should depend neither on
    the other samples nor on the batch size.
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
            seeded_network(model, draw_seed(private), device),
            _refuse_carried_states(model),
        ):
            yield private
    finally:
        # weights cast without a graph would lose the caller's gradients
        torch.clear_autocast_cache()


@contextmanager
def isolated(model: Model, x: Tensor, generator: Randomness) -> Iterator[Private]:
    """As ``crafting``, for code of other packages: Python and numpy get a seed of their own, and
    afterwards the generators of all devices, and ``.grad`` and ``requires_grad`` of every
    parameter, are as before.
    """
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    kept = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    devices: list[int] = []
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices += range(torch.cuda.device_count())
    try:
        with (
            torch.random.fork_rng(devices=devices),
            crafting(model, x.device, generator) as private,
        ):
            seed = draw_seed(private)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002  other packages draw from it
            for parameter in parameters:
                parameter.grad = None
            yield private
    finally:
        for parameter, grad, requires_grad in kept:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def averaged(model: Model, draws: int) -> Model:
    """A model whose logits are means over so many forwards; the model itself for one."""
    if draws == 1:
        return model
    return lambda x: torch.stack([model(x) for _ in range(draws)]).mean(0)


def seeds_of_samples(private: Private, samples: int, seed: int) -> SampleSeeds:
    """The seeds that the caller gave, or seeds derived from ``seed`` if there were none."""
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
    """Mean over the forwards, [N, classes], from which ``fooled`` follows."""


class _NonFiniteGradientError(FloatingPointError, ValueError):
    """A gradient with NaN or infinity: a ValueError as all that an attack refuses, and a
    FloatingPointError, by which a training recognises it.
    """


@dataclass(frozen=True)
class Objective:
    """What a gradient attack maximises: the loss of every sample (its negative if ``targeted``),
    averaged over ``eot_samples`` forwards.
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
        forwards = []
        for _ in range(self.eot_samples):
            logits, losses = self._forward(x, y)
            grad += input_gradient(losses, x)
            forwards.append((logits.detach(), losses.detach()))
        return grad / self.eot_samples, self._mean_score(forwards, y)

    @torch.no_grad()
    def score(self, x: Tensor, y: Tensor) -> ImageScores:
        """Score at ``x`` without a gradient."""
        forwards = [self._forward(x, y) for _ in range(self.eot_samples)]
        return self._mean_score(forwards, y)

    def _forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, classes] and what is maximised [N]."""
        logits = logits_of(self.model, x, y)
        loss = _cross_entropy if self.loss is None else self.loss
        losses = loss(logits, y)
        if losses.shape != y.shape:
            raise ValueError(
                f"loss must return one value per sample, [{y.shape[0]}], got "
                f"{list(losses.shape)}; use reduction='none'"
            )
        if self.targeted:
            losses = -losses
        return logits, losses

    def _mean_score(self, forwards: list[tuple[Tensor, Tensor]], y: Tensor) -> ImageScores:
        all_logits, all_losses = zip(*forwards, strict=True)
        logits = torch.stack(all_logits).mean(0)
        loss = torch.stack(all_losses).mean(0)
        predicted = logits.argmax(1)
        fooled = predicted == y if self.targeted else predicted != y
        return ImageScores(loss, fooled, logits)


def lowest_loss(x: Tensor) -> Tensor:
    """Minus infinity for every sample, [N], which any loss exceeds."""
    return x.new_full(x.shape[:1], -torch.inf, dtype=torch.float64)


class Best:
    """Best image so far per sample: one that fools before one that does not, then the higher
    loss.
    """

    def __init__(self, x: Tensor) -> None:
        """Begin with the images themselves, as if they fooled nothing at the lowest loss."""
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
        """Keep images ``x_adv`` of the samples ``rows`` that are better than the best so far."""
        kept_fooled = self.fooled[rows]
        higher = (fooled == kept_fooled) & (loss > self.loss[rows])
        better = ((fooled & ~kept_fooled) | higher).nonzero().squeeze(1)
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
    """Check the arguments of a gradient attack, and copy images and labels.

    The copies have no graph, and a model that keeps or changes them does not reach the caller's.
    """
    if not is_checked():
        check_model(model)
        check_images(x)
        check_labels(y, x)
    check_seeds(generator, x)
    with torch.inference_mode(False):
        return x.detach().clone(), y.clone()


def direction(grad: Tensor, norm: NormName) -> Tensor:
    """Steepest ascent of unit length per sample; 0 for a zero gradient."""
    if norm == "Linf":
        return grad.sign()
    length = per_sample(l2_norm(grad), grad)
    length = torch.where(length > 0, length, 1.0)
    unit = grad.double() / length
    return unit.to(grad.dtype)


def wide(x: Tensor) -> Tensor:
    """Images in float64 if they are in it, else in float32, so that a search does not compute in
    half precision.
    """
    return x if x.dtype == torch.float64 else x.float()


def input_gradient(losses: Tensor, x: Tensor, *, keep_graph: bool = False) -> Tensor:
    """Gradient of the losses [N] with respect to the images, each of its own loss.

    It is that of their sum, since a mean would shrink it with N.
    """
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
            "the gradient at the images must be finite, got NaN or infinity; craft in float32, "
            "with weights that are finite"
        )
    return grad


@contextmanager
def _refuse_carried_states(model: object) -> Iterator[None]:
    """RuntimeError where a neuron begins a forward of ``model`` with the state that the one before
    left. 检查状态重置。

    Every step of an attack would then see another network, and its gradient would belong to none of
    the images. What lies in a classifier that says ``resets_itself`` is not looked at, so that
    nothing is paid for it; nor is what no hook can see: a plain function around a network, or a
    compiled one.
    """
    neurons: list[nn.Module] = []
    if isinstance(model, nn.Module) and not is_compiled(model):
        neurons = list(filter(_memories, _bare_modules(model)))
    if not neurons:
        yield
        return
    assert isinstance(model, nn.Module)  # it has neurons
    left: dict[nn.Module, list[Tensor]] = {}

    def begin(*_: object) -> None:
        left.update({neuron: _states(neuron) for neuron in neurons})

    def called(neuron: nn.Module, *_: object) -> None:
        before = left.pop(neuron, [])
        for state in _states(neuron):
            if any(state is earlier for earlier in before):
                raise RuntimeError(
                    f"{type(neuron).__name__} still holds the state of the previous forward pass, "
                    "so every step of the attack would see a different network: attack "
                    "SpikingClassifier(net, T=...), which resets the network before every forward"
                )

    hooks = [
        model.register_forward_pre_hook(begin),
        *(neuron.register_forward_pre_hook(called) for neuron in neurons),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _bare_modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and its parts, except for those in a classifier that resets them."""
    if getattr(module, "resets_itself", False):
        return
    yield module
    for child in module.children():
        yield from _bare_modules(child)


def _memories(module: nn.Module) -> dict[str, Any]:
    memories = vars(module).get("_memories")
    return memories if isinstance(memories, dict) else {}


def _states(module: nn.Module) -> list[Tensor]:
    """Tensors that a reset would put something else in the place of; one with a tensor to return to
    keeps its own.
    """
    initial = vars(module).get("_memories_rv", {})
    found = []
    for name, value in _memories(module).items():
        if isinstance(value, Tensor) and not isinstance(initial.get(name), Tensor):
            found.append(value)
    return found


@runtime_checkable
class _HasQuicker(Protocol):
    """A model that knows a faster copy of itself."""

    def quicker(self) -> Model | None:
        """The copy; None if there is none."""


def quicker(model: Model, x: Tensor, logits: Tensor) -> Model:
    """A faster copy of the model, if it has one that gives the logits of ``x`` as well; else the
    model itself.

    The copy may round differently and then spike differently, so an image that fools it has to be
    tried on the model. A compiled network has no copy: it would be compiled, too.
    """
    if not isinstance(model, _HasQuicker) or (isinstance(model, nn.Module) and is_compiled(model)):
        return model
    if (copy := model.quicker()) is None:
        return model
    try:
        found = copy(x)
    except RuntimeError:  # a neuron that runs in two places takes more than T steps
        return model
    return model if differ(logits, found) else copy
