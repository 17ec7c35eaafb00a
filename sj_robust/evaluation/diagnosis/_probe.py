"""What the masking diagnostics measure on a few images: gradients, also between spiking layers
beside finite differences, attacks and their success.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.attacks import fgsm, pgd
from sj_robust.attacks.apgd import apgd
from sj_robust.attacks.call import Model
from sj_robust.attacks.logits import differing, margin
from sj_robust.core.checks import check_logits, logits_of, taken_for_checked
from sj_robust.core.host import is_neuron, step_mode
from sj_robust.core.preserved import seeded_network
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.threat import ThreatModel, l2_norm, linf_bounds, per_sample, project_l2
from sj_robust.estimators import estimator
from sj_robust.evaluation.run.draws import changed_by_others

__all__ = [
    "Gradients",
    "Probe",
    "agreement",
    "agreement_far",
]

_FEATURES = 512
_SLOPE = 8.0
"""Of the random features: steep enough to bend within the pixels of an image."""
_RIDGE = 1e-3
_LEAST_STEP = 0.01
"""Of every pixel, which neither rounding nor an image of 8 bits hides."""
_INNER = (0.93, 0.98)
"""Shares of the radius between which the smaller one is drawn."""


@dataclass(frozen=True)
class Gradients:
    """Gradient of the loss ``max_{j != y} z_j - z_y`` at the images, where softmax cannot saturate.

    Attributes:
        elements: The gradient, [N, features] in float64.
        margin: ``z_y - max_{j != y} z_j``, [N].
        spread: Largest minus smallest logit, [N].
        reach: Largest change of the loss within [0, 1] that the gradient predicts, [N].
        connected: Whether the graph reaches the images at all.
    """

    elements: Tensor
    margin: Tensor
    spread: Tensor
    reach: Tensor
    connected: bool


@dataclass(frozen=True, eq=False)
class Probe:
    """A model and a few images in one threat model; every method is a function of its arguments and
    the seed.
    """

    model: Model
    x: Tensor
    y: Tensor
    threat: ThreatModel
    seed: int
    steps: int
    eot_samples: int
    plain: Model | None = None

    @cached_property
    def repeated(self) -> Tensor:
        """Logits of three forwards with different random numbers, [3, N, classes]."""
        draws = [self.logits(self.x, draw=draw) for draw in range(3)]
        return torch.stack(draws)

    @cached_property
    def random(self) -> Tensor:
        """Images whose logits differ between forwards by more than rounding, [N] bool."""
        first = self.repeated[0]
        difference = (self.repeated - first).abs().amax((0, 2))
        largest = first.abs().amax(1).clamp(min=1e-12)
        return difference > 1e-4 * largest

    @cached_property
    def right(self) -> Tensor:
        """Images classified correctly in every forward, [N] bool."""
        return (self.repeated.argmax(2) == self.y).all(0)

    @property
    def diameter(self) -> float:
        """Radius with which the ball around any image holds all of [0, 1]."""
        if self.threat.norm == "Linf":
            return 1.0
        return float(self.x[0].numel() ** 0.5)

    def rate(self, fooled: Tensor) -> float:
        """Share of the images classified correctly."""
        return int(fooled.sum()) / int(self.right.sum())

    @torch.no_grad()
    def logits(self, x: Tensor, *, draw: int = 0) -> Tensor:
        """Logits in float64, with the random numbers of a draw."""
        with seeded_network(self.model, self._seed("forward", draw), x.device):
            return check_logits(self.model(x), self.y).double()

    def fooled(self, x_adv: Tensor) -> Tensor:
        """Images classified right that ``x_adv`` turns wrong, in two of three forwards if outputs
        are random.
        """
        is_random = bool(self.random.any())
        draws = range(3, 6) if is_random else range(1)
        wrong = torch.zeros_like(self.y)
        for draw in draws:
            wrong += self.logits(x_adv, draw=draw).argmax(1) != self.y
        return self.right & (2 * wrong > len(draws))

    @cached_property
    def attacked(self) -> Tensor:
        """Images after the attack with the model's own gradient."""
        return self.attack()

    @cached_property
    def white_box(self) -> Tensor:
        """Images that this attack fools, [N] bool."""
        return self.fooled(self.attacked)

    def changed(self) -> dict[str, Tensor]:
        """Images whose logits, with noise or attacked, change where they should not, [N] bool."""
        none = torch.zeros_like(self.right)
        places = ("under an attack", "in an unused copy", "in another order", "alone")
        found = {place: none.clone() for place in places}
        is_random = bool(self.random.any())  # numbers then belong to places in a batch
        for x in (self.noise(0), self.attacked):
            with torch.no_grad():
                usual = self._repeatable(self.model, x)
                if self.plain is not None:
                    unused = self._repeatable(self.plain, x)
                    found["in an unused copy"] |= differing(usual, unused)
            found["under an attack"] |= differing(usual, self._told(x))
            if is_random:
                continue
            with torch.no_grad():
                answer = partial(self._repeatable, self.model)
                changed = changed_by_others(answer, x, usual, alone=len(x))
            for place, images in changed.items():
                found[place] |= images
        return found

    def _told(self, x: Tensor) -> Tensor:
        """The logits that an attack begins with, which asks with gradients."""
        told: list[Tensor] = []

        def asked(images: Tensor) -> Tensor:
            told.append(self._repeatable(self.model, images))
            return told[-1]

        if self.gradients.connected:
            with taken_for_checked():
                fgsm(asked, x, self.y, eps=self.threat.eps)
        return told[0].detach() if told else self.logits(x)

    @cached_property
    def agreement(self) -> dict[str, float]:
        """How well gradients predict finite differences, by what is moved; not the images, where
        a network turns them into random spikes.
        """
        forward = partial(self._repeatable, self.model)
        is_random = bool(self.random.any())
        seed = self._seed("slopes")
        return agreement(self.model, forward, self.x, seed=seed, with_images=not is_random)

    @cached_property
    def agreement_far(self) -> float:
        """How well the gradient predicts a step of the radius, up to the first spiking layers."""
        if bool(self.random.any()):
            return 1.0
        forward = partial(self._repeatable, self.model)
        step = max(_LEAST_STEP, self.threat.eps / self.diameter)
        return agreement_far(self.model, forward, self.x, seed=self._seed("slopes"), step=step)

    def losses(self, x: Tensor) -> Tensor:
        """``max_{j != y} z_j - z_y`` of every image, a mean over several forwards if outputs are
        random.
        """
        is_random = bool(self.random.any())
        draws = max(self.eot_samples, 8) if is_random else 1
        losses = []
        for draw in range(draws):
            logits = self.logits(x, draw=draw)
            losses.append(-margin(logits, self.y))
        return torch.stack(losses).mean(0)

    @cached_property
    def gradients(self) -> Gradients:
        """Gradients at the images, from one forward and backward pass."""
        x = self.x.detach().clone().requires_grad_()
        seed = self._seed("gradient")
        with torch.enable_grad(), seeded_network(self.model, seed, x.device):
            logits = check_logits(self.model(x), self.y)
            own = margin(logits, self.y)
            grad: Tensor | None = None
            if own.requires_grad:
                (grad,) = torch.autograd.grad(-own.sum(), x, allow_unused=True)
        connected = grad is not None
        elements = torch.zeros_like(x) if grad is None else grad
        room = torch.where(elements > 0, 1 - x.detach(), x.detach())
        spread = logits.amax(1) - logits.amin(1)
        reach = elements.double().abs() * room
        return Gradients(
            elements=elements.flatten(1).double(),
            margin=own.detach().double(),
            spread=spread.detach().double(),
            reach=reach.flatten(1).sum(1),
            connected=connected,
        )

    def attack(
        self, *, eps: float | None = None, steps: int | None = None, source: nn.Module | None = None
    ) -> Tensor:
        """Images after PGD from the clean image: the best iterate on the model, the last one on
        another ``source``.
        """
        eps = self.threat.eps if eps is None else eps
        steps = self.steps if steps is None else steps
        model = self.model if source is None else source
        return self._pgd(model, eps, steps, step_size=2.5 * eps / steps)

    @cached_property
    def usual(self) -> Tensor:
        """Images that APGD with the training surrogate fools, [N] bool."""
        return self.fooled(self.strong_attack())

    @cached_property
    def inner(self) -> float:
        """A smaller radius, drawn: no network knows where attacks of this size end."""
        generator = torch.Generator().manual_seed(self._seed("inner"))
        low, high = _INNER
        share = low + (high - low) * float(torch.rand((), generator=generator))
        return share * self.threat.eps

    def strong_attack(self, name: str = "training", *, eps: float | None = None) -> Tensor:
        """Images after APGD; with an estimator for models that are modules."""
        if name == "training" and not self.gradients.connected:
            return self.x.clone()
        applied: AbstractContextManager[Model] = nullcontext(self.model)
        if name != "training":
            assert isinstance(self.model, nn.Module)  # only spiking networks are compared
            applied = estimator(name)(self.model)
        threat = self.threat if eps is None else replace(self.threat, eps=eps)
        with applied as crafting, taken_for_checked():
            return apgd(
                crafting,
                self.x,
                self.y,
                eps=threat,
                steps=2 * self.steps,
                eot_samples=self.eot_samples,
                generator=self._generator(),
            )

    def single_step(self) -> Tensor:
        """Images after one step to the border of the ball."""
        return self._pgd(self.model, self.threat.eps, 1, step_size=self.threat.eps)

    def noise(self, draw: int) -> Tensor:
        """Images after random noise of the full size: a corner of the Linf ball or a point of the
        L2 sphere.
        """
        generator = torch.Generator().manual_seed(self._seed("noise", draw))
        direction = torch.randn(self.x.shape, generator=generator, dtype=torch.float64)
        return self.moved(direction.to(self.x.device))

    def moved(self, direction: Tensor, share: float = 1.0) -> Tensor:
        """Images after a step along a direction, steepest in the norm, over a share of the
        radius.
        """
        x = self.x
        eps = share * self.threat.eps
        if self.threat.norm == "Linf":
            low, high = linf_bounds(x, eps=eps)
            corner = x + eps * direction.sign().to(x.dtype)
            return corner.clamp(low, high)
        length = l2_norm(direction)
        length = torch.where(length > 0, length, 1.0)
        step = direction.double() / per_sample(length, direction)
        return project_l2(x + eps * step.to(x.dtype), x, eps=eps)

    def unbounded(self) -> Tensor:
        """Images after an attack that may go anywhere in [0, 1]."""
        return self.attack(eps=self.diameter, steps=max(2 * self.steps, 40))

    def substitute(self) -> nn.Module:
        """A small network fitted to the logits of the model on noisy copies of the images: a black
        box's stand-in.
        """
        fit = 2**26 // self.x.numel()  # into a quarter of a gigabyte, unless images are huge
        copies = min(64, max(6, fit))
        generator = torch.Generator().manual_seed(self._seed("copies"))
        radius = self.threat.eps / self.diameter  # per pixel
        factors = (1.0, 2.0, 4.0)
        inputs: list[Tensor] = []
        targets: list[Tensor] = []
        for copy in range(copies):
            size = factors[copy % 3] * radius
            uniform = torch.rand(self.x.shape, generator=generator).to(self.x)
            noisy = self.x + size * (2 * uniform - 1)
            images = noisy.clamp(0, 1)
            inputs.append(images)
            targets.append(self.logits(images, draw=copy))
        network = _fitted(torch.cat(inputs), torch.cat(targets), seed=self._seed("fit"))
        return network.to(self.x.dtype)

    def _pgd(self, model: Model, eps: float, steps: int, *, step_size: float) -> Tensor:
        """PGD from the clean image; what is crafted elsewhere keeps its last iterate, as it fools
        that one too soon.
        """
        own = model is self.model
        if own and not self.gradients.connected:
            return self.x.clone()
        with taken_for_checked():
            return pgd(
                model,
                self.x,
                self.y,
                eps=replace(self.threat, eps=min(eps, self.diameter)),
                step_size=step_size,
                steps=steps,
                random_start=False,
                eot_samples=self.eot_samples,
                keep_best=own,
                stop_early=own and not bool(self.random.any()),  # one draw may be lucky
                generator=self._generator(),
            )

    def _repeatable(self, model: Model, x: Tensor) -> Tensor:
        """Logits with the same random numbers in every call, in the mode for gradients as it is."""
        with seeded_network(model, self._seed("repeatable"), x.device):
            return logits_of(model, x, self.y[:1].expand(len(x)))  # of which one stands for all

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed("attack"))

    def _seed(self, *labels: int | str) -> int:
        return SampleSeeds([self.seed]).derived(*labels).single()


def _fitted(inputs: Tensor, targets: Tensor, *, seed: int) -> nn.Module:
    """A layer of random features under one that is fitted to standardised logits by least squares,
    which no optimizer is needed for.

    Source: Rahimi and Recht, "Random features for large-scale kernel machines" (NeurIPS 2007).
    """
    x = inputs.flatten(1).double()
    pixels = x.shape[1]
    wide = partial(nn.Linear, dtype=torch.float64, device=x.device)
    hidden = wide(pixels, _FEATURES)
    last = wide(_FEATURES, targets.shape[1])
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(_FEATURES, pixels, generator=generator, dtype=torch.float64)
    uniform = torch.rand(_FEATURES, generator=generator, dtype=torch.float64)
    shift = (2 * uniform - 1).to(x.device)
    deviation = targets.std().clamp(min=1e-6)
    wanted = (targets.double() - targets.mean()) / deviation
    with torch.no_grad():
        hidden.weight.copy_(_SLOPE / pixels**0.5 * weight)
        hidden.bias.copy_(shift - hidden.weight @ x.mean(0))
        of_hidden = nn.functional.softplus(hidden(x))
        constant = torch.ones_like(x[:, :1])
        features = torch.cat((of_hidden, constant), dim=1)
        square = features.T @ features
        square.diagonal().add_(_RIDGE * len(x))
        fitted = torch.linalg.solve(square, features.T @ wanted)
        last.weight.copy_(fitted[:-1].T)
        last.bias.copy_(fitted[-1])
    return nn.Sequential(nn.Flatten(), hidden, nn.Softplus(), last)


Forward = Callable[[Tensor], Tensor]

IMAGES = "the images"
_STEPS = (1e-3, 1e-2, 1e-1)
"""Steps whose differences are measured: the first that rounding spares, and larger ones for a
network that rounds its images itself.
"""
_DRAWS = 2
_AWAY = 0.05
"""How far from the images and the spikes slopes are taken, where maxima are not tied."""


def agreement(
    model: object, forward: Forward, x: Tensor, *, seed: int, with_images: bool
) -> dict[str, float]:
    """How well the gradient predicts what a small step does, by the name of what moves: the images,
    and the outputs of every spiking layer.

    Equation, with a step ``d v`` of what moves, the inputs ``i`` of the spiking layers that it
    reaches without passing another one (or the logits), random weights ``u`` of these, and sums
    over images and draws::

        cosine(<grad <u, i>, v>, <u, i(d v) - i(0)> / d)

    The best over a few ``d`` counts; it is 1 for an honest gradient of any length. What spiking
    layers put out is held, so that none of their surrogates has a part.

    Args:
        model: The network.
        forward: Its logits [N, classes], with equal random numbers in every call.
        x: Images [N, ...].
        seed: Of the directions.
        with_images: Whether the images are moved.
    """
    held = _Held(len(x), seed)
    with held.inside(model):
        held.begin(forward, x)
        names = [name for name in held.leaves if with_images or name != IMAGES]
        return {name: max(held.agreement(forward, name, _STEPS)) for name in names}


def agreement_far(model: object, forward: Forward, x: Tensor, *, seed: int, step: float) -> float:
    """How well the gradient at the images predicts what one larger step does to the inputs of the
    spiking layers that they reach first; 1 for a network without spiking layers, which may bend.

    Args:
        model: The network.
        forward: Its logits, as in :func:`agreement`.
        x: Images [N, ...].
        seed: Of the directions.
        step: Of every pixel.
    """
    held = _Held(len(x), seed)
    with held.inside(model):
        held.begin(forward, x)
        if held.leaves.keys() == {IMAGES}:
            return 1.0
        (found,) = held.agreement(forward, IMAGES, (step,))
        return found


class _Held:
    """A network whose spiking layers put out what they did in the first forward, beside it, or
    moved from there.
    """

    def __init__(self, images: int, seed: int) -> None:
        self.leaves: dict[str, list[_Values]] = {}
        self._images = images
        self._generator = torch.Generator().manual_seed(seed)
        self._calls: Counter[str] = Counter()
        self._inputs: list[_Values] = []
        self._moved: dict[str, list[Tensor]] = {}

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers in [0, 1]."""
        return torch.rand(like.shape, generator=self._generator).to(like)

    @contextmanager
    def inside(self, model: object) -> Iterator[None]:
        """Hooks on every spiking layer."""
        handles = []
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        for name, module in modules:
            if is_neuron(module):
                dim = 1 if step_mode(module) == "m" else 0
                before, after = partial(self._begins, dim), partial(self._ends, dim, name)
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def begin(self, forward: Forward, x: Tensor) -> None:
        """Find what every spiking layer puts out, near the images and within [0, 1]."""
        self.run(forward, torch.where(x < 0.5, x, x - _AWAY))

    def run(self, forward: Forward, x: Tensor | None = None) -> list["_Values"]:
        """What the leaves move, in the order of a forward."""
        self._calls.clear()
        self._inputs = []
        logits = forward(self._output(IMAGES, 0, x))
        return [*self._inputs, _Values(logits, 0)]

    def agreement(self, forward: Forward, name: str, steps: Sequence[float]) -> list[float]:
        """The cosine of every step; 0 where a network does something else then."""
        leaves = self.leaves[name]
        with torch.enable_grad():
            base = self.run(forward)
        by_image = all(one.fits(self._images) for one in (*leaves, *base))
        predicted: list[Tensor] = []
        measured: dict[float, list[Tensor]] = {step: [] for step in steps}
        for _ in range(_DRAWS):
            ways = [(self.uniform(leaf.tensor) - 0.5).sign() for leaf in leaves]
            weights = [self.uniform(target.tensor) - 0.5 for target in base]
            slopes = _slopes(base, weights, leaves)
            products = [
                leaf.times(g, way) for leaf, g, way in zip(leaves, slopes, ways, strict=True)
            ]
            predicted.append(_total(products, by_image))
            for step in steps:
                self._moved = {name: [step * way for way in ways]}
                with torch.no_grad():
                    after = self.run(forward)
                self._moved = {}
                if _shapes(after) != _shapes(base):  # as with other time steps
                    return [0.0] * len(steps)
                changes = [
                    one.times(one.tensor - before.tensor.detach(), weight / step)
                    for one, before, weight in zip(after, base, weights, strict=True)
                ]
                measured[step].append(_total(changes, by_image))
        claimed = torch.cat(predicted)
        return [_cosine(claimed, torch.cat(found)) for found in measured.values()]

    def _output(self, name: str, dim: int, given: Tensor | None) -> Tensor:
        """What a layer puts out in its next call."""
        known, number = self.leaves.setdefault(name, []), self._calls[name]
        self._calls[name] += 1
        if number == len(known):
            assert given is not None  # of the first forward
            leaf = given.detach() + _AWAY * self.uniform(given)
            known.append(_Values(leaf.requires_grad_(), dim))
        found = known[number].tensor
        return found + self._moved[name][number] if name in self._moved else found

    def _begins(self, dim: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            self._inputs.append(_Values(arguments[0], dim))

    def _ends(self, dim: int, name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        return self._output(name, dim, output) if isinstance(output, Tensor) else output


@dataclass(frozen=True)
class _Values:
    """A tensor and the dimension of its images."""

    tensor: Tensor
    dim: int

    def fits(self, images: int) -> bool:
        """Whether this dimension is of the images."""
        return self.tensor.shape[self.dim : self.dim + 1] == (images,)

    def times(self, one: Tensor, other: Tensor) -> "_Values":
        """A product of its shape."""
        return _Values(one.double() * other.double(), self.dim)


def _shapes(values: list[_Values]) -> list[torch.Size]:
    return [one.tensor.shape for one in values]


def _slopes(base: list[_Values], weights: list[Tensor], leaves: list[_Values]) -> list[Tensor]:
    """The gradient of the weighted values at the leaves, zero where there is none."""
    moved = [leaf.tensor for leaf in leaves]
    pairs = zip(base, weights, strict=True)
    connected = [(one.tensor * weight).sum() for one, weight in pairs if one.tensor.requires_grad]
    if not connected:
        return list(map(torch.zeros_like, moved))
    return list(
        torch.autograd.grad(
            torch.stack(connected).sum(),
            moved,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _total(values: list[_Values], by_image: bool) -> Tensor:
    """The sum of every image, [N]; over all of them, [1], where it is not known which is whose."""
    if not by_image:
        return torch.stack([one.tensor.sum() for one in values]).sum()[None]
    of_images = [one.tensor.movedim(one.dim, 0).flatten(1).sum(1) for one in values]
    return torch.stack(of_images).sum(0)


def _cosine(one: Tensor, other: Tensor) -> float:
    """Of two vectors, of which two of zeros agree."""
    one, other = one.detach(), other.detach()
    lengths = one.norm() * other.norm()
    if float(lengths) == 0:
        return float(one.norm() == other.norm())
    return float((one @ other) / lengths)
