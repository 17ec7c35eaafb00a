"""The training step of every mode beside those that the papers' code runs, written down plainly;
the floor of an adversarial step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.benchmarking.layers import Shape, Task, lif_node
from lab.benchmarking.networks import (
    EXACT,
    FUSED,
    PRECISIONS,
    Precision,
    TrainingTask,
    check_same_steps,
    convolutional_network,
)
from sj_robust.attacks import SampleSeeds
from sj_robust.classifier import SpikingClassifier
from sj_robust.core.host import functional, neuron
from sj_robust.core.randomness import draw_seed, private_generator, rand, randn
from sj_robust.models.chain import SmallConvNet
from sj_robust.neuron import DLIFNode
from sj_robust.ops.trains.config import BoundsBackend
from sj_robust.proofs.windows import SpikeTrains

if TYPE_CHECKING:
    from sj_robust.training.modes import ModeName

TRADES_WEIGHT = 6.0
Build = Callable[[Shape], nn.Module]
"""Makes a network for images of a shape."""
Draw = Callable[[Tensor], Tensor]
"""Noise in the shape of the images."""
Goal = Callable[[Tensor], Tensor]
"""What an attack maximises, as a function of the logits."""


@dataclass(frozen=True)
class Step:
    """A training step of a mode on a network.

    Attributes:
        mode: Name of the mode.
        build: Makes the network.
        eps: Radius of the attack; for ``"gaussian"`` the standard deviation of the noise.
        noise: Standard deviation of the noise with which ``"at"``, ``"rat"`` and ``"trades"``
            start.
    """

    mode: "ModeName"
    build: Build
    eps: float = 8 / 255
    noise: float = 0.001


class PublishedTask(TrainingTask):
    """A step as the code of its paper makes it; batch norm and neuron run one after the other.

    An attack runs the network in evaluation mode, except for its neurons: in SpikingJelly
    0.0.0.0.14 they have a gradient in training mode only. The loss runs all of it in training mode.

    Source: Ding et al. (ICML 2024), Madry et al. (ICLR 2018), Zhang et al. (ICML 2019), Ding et
    al. (NeurIPS 2022).
    """

    def __init__(
        self,
        step: Step,
        shape: Shape,
        *,
        precision: Precision = Precision(),  # noqa: B008  # it is frozen
        draw: Draw | None = None,
    ) -> None:
        """Build the network and draw the images; without ``draw`` the noise is torch's own."""
        from sj_robust.training import MODES  # brings Accelerate and more

        mode = MODES[step.mode]
        super().__init__(
            step.build(shape),
            shape,
            precision,
            weight_decay=mode.weight_decay,
        )
        self._step = step
        self._mode = mode
        self._T = shape[0]
        self._draw: Draw = torch.rand_like if step.mode == "pgd_at" else torch.randn_like
        if draw is not None:
            self._draw = draw
        self._nodes = [
            module for module in self.net.modules() if isinstance(module, neuron.LIFNode | DLIFNode)
        ]

    def forward(self) -> Tensor:
        """Craft the perturbed images and compute the loss."""
        self.net.eval()
        for node in self._nodes:
            node.train()
        x_perturbed = self.crafted()
        self.net.train()
        return self.loss(x_perturbed)

    def backward(self, loss: Tensor) -> None:
        """Gradients, a step of the optimizer, and the retraction if the mode has one."""
        super().backward(loss)
        if self._mode.retraction > 0:
            self.retract(self._mode.retraction)

    def logits(self, images: Tensor) -> Tensor:
        """Mean of the outputs over T time steps, in each of which the network sees the images."""
        functional.reset_net(self.net)
        frames = images.unsqueeze(0).repeat(self._T, 1, 1, 1, 1)
        outputs: Tensor = self.net(frames)
        return outputs.mean(0)

    def crafted(self) -> Tensor:
        """The perturbed images of the mode; the clean ones if it has none."""
        x = self.x
        eps = self._step.eps
        noise = self._step.noise
        match self._step.mode:
            case "none":
                return x
            case "gaussian":
                return x + eps * self._draw(x)
            case "at" | "rat":  # one step, not projected onto the ball
                with torch.no_grad():
                    self.logits(x)  # the papers' code makes this pass and does not use it
                start = x + noise * self._draw(x)
                step = eps * self._sign(start, self._entropy)
                return (start + step).clamp(0, 1)
            case "pgd_at":
                uniform = 2 * self._draw(x) - 1
                start = (x + eps * uniform).clamp(0, 1)
                return self._ascended(start, self._entropy)
            case "trades":
                with torch.no_grad():
                    clean = self.logits(x).log_softmax(1)
                divergence = partial(_divergence, clean, reduction="sum")
                return self._ascended(x + noise * self._draw(x), divergence)
        raise ValueError(f"there is no published loop of mode {self._step.mode}")

    def loss(self, x_perturbed: Tensor) -> Tensor:
        """The loss of the mode: TRADES, the objective with MS-MPPD, or plain cross entropy."""
        if self._mode.loss == "trades":
            return self._trades_loss(x_perturbed)
        if self._mode.rho > 0:
            return self._mppd_loss(x_perturbed)
        return self._entropy(self.logits(x_perturbed))

    def _trades_loss(self, x_perturbed: Tensor) -> Tensor:
        """``CE(clean) + 6 * KL(clean || perturbed)``."""
        logits = self.logits(self.x)
        log_clean = logits.log_softmax(1)
        divergence = _divergence(log_clean, self.logits(x_perturbed), reduction="batchmean")
        return self._entropy(logits) + TRADES_WEIGHT * divergence

    def _mppd_loss(self, x_perturbed: Tensor) -> Tensor:
        """``kappa * CE(clean) + (1 - kappa) * CE(perturbed) + rho * MS-MPPD``, the last term of the
        last spiking layer.
        """
        last = self._nodes[-1]
        currents: list[Tensor] = []
        hook = last.register_forward_pre_hook(lambda _, inputs: currents.append(inputs[0]))
        clean_loss = self._entropy(self.logits(self.x))
        perturbed_loss = self._entropy(self.logits(x_perturbed))
        hook.remove()
        clean_current, perturbed_current = currents
        difference = clean_current.detach() - perturbed_current
        decay = last.decay if isinstance(last, DLIFNode) else 1 - 1 / last.tau
        mppd = torch.zeros_like(difference[0])
        ms_mppd = torch.zeros_like(clean_loss)
        for current in difference:
            mppd = decay * mppd + current
            ms_mppd = ms_mppd + mppd.square().mean() / self._T
        kappa = self._mode.kappa
        return kappa * clean_loss + (1 - kappa) * perturbed_loss + self._mode.rho * ms_mppd

    @torch.no_grad()
    def retract(self, beta: float) -> None:
        """Step of every weight matrix W towards orthonormal rows: ``W + beta * (W - W W^T W)``.

        SNN-RAT's code takes at most 200 rows of a linear layer; those here have fewer.
        """
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                matrix = module.weight.view(len(module.weight), -1)
                matrix.add_(matrix - matrix @ matrix.t() @ matrix, alpha=beta)

    def _ascended(self, at: Tensor, goal: Goal) -> Tensor:
        """Take the mode's number of steps of eps / 4, each projected onto the ball and [0, 1]."""
        eps = self._step.eps
        for _ in range(self._mode.attack_steps):
            at = at + eps / 4 * self._sign(at, goal)
            at = at.clamp(self.x - eps, self.x + eps).clamp(0, 1)
        return at

    def _sign(self, images: Tensor, goal: Goal) -> Tensor:
        """Sign of the gradient of the goal with respect to the images."""
        images = images.detach().requires_grad_()
        value = goal(self.logits(images))
        (grad,) = torch.autograd.grad(value, images)
        return grad.sign()

    def _entropy(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.y)


def _divergence(log_clean: Tensor, logits: Tensor, *, reduction: str) -> Tensor:
    log_perturbed = logits.log_softmax(1)
    return F.kl_div(log_perturbed, log_clean, reduction=reduction, log_target=True)


if TYPE_CHECKING:
    from sj_robust.training.modes import ModeName

Methods = dict[str, Callable[[Shape], Task]]


class ModeTask(TrainingTask):
    """One step of this package: perturbed images, both passes, loss, optimizer, retraction.

    It is made of the parts that the training engine calls, on a network of DLIF neurons behind
    batch norm, and must equal the published loop on the network of ``peer``.
    """

    def __init__(
        self,
        step: Step,
        peer: Build,
        precision: Precision,
        shape: Shape,
        *,
        joint: BoundsBackend | None = None,
        kappa: float | None = None,
        surrogate_width: float = 1.0,
    ) -> None:
        """Build the network and draw the images; with ``joint`` bounds hold together over time.

        ``kappa`` is the mode's own if None, ``surrogate_width`` that of the bounds.
        """
        from sj_robust import training  # brings Accelerate and more, which layers do not need

        mode = training.MODES[step.mode]
        super().__init__(
            step.build(shape),
            shape,
            precision,
            weight_decay=mode.weight_decay,
            one_pass=True,
        )
        self._step = step
        self._peer = peer
        self._mode = mode
        self._certifies = mode.loss == "certified"
        self._attack: Any = None
        if not self._certifies:  # bounds, and without MS-MPPD nothing to attack for
            self._attack = training.training_attack(
                step.mode,
                eps=step.eps,
                noise_std=step.noise,
                project=step.mode not in ("at", "rat"),  # as published
            )
        options = training.CertifiedOptions(surrogate_width=surrogate_width)
        if joint is not None:
            options = replace(options, bounds="joint")
            SpikeTrains.backend = joint  # every task has a process of its own
        self._objective = training.Objective(
            SpikingClassifier(self.net, shape[0]),
            kappa=mode.kappa if kappa is None else kappa,
            rho=mode.rho,
            loss=mode.loss,
            trades_weight=TRADES_WEIGHT,
            certified_eps=step.eps if self._certifies else None,
            certified_options=options,
        )
        self._retract = training.retract_
        self.seeds = SampleSeeds(range(shape[1]))

    def forward(self) -> Tensor:
        """Crafts the perturbed images; the loss."""
        x_perturbed = None
        with self.autocast():
            if self._attack is not None:
                x_perturbed = self._attack(
                    self._objective.classifier,
                    self.x,
                    self.y,
                    generator=self.seeds,
                )
            total: Tensor = self._objective(self.x, self.y, x_perturbed).total
        return total

    def backward(self, loss: Tensor) -> None:
        """Gradients, a step of the optimizer, the retraction."""
        super().backward(loss)
        if self._mode.retraction > 0:
            generator = torch.Generator().manual_seed(0)
            self._retract(self.net, self._mode.retraction, generator)

    def check(self) -> None:
        """Compare with the published loop in float64, from the same noise; raises ValueError.

        DLIF's gains do not learn there: LIFNode has none. ``certified`` has no published loop on
        a spiking network; its loss is checked by the tests alone.
        """
        if self._certifies:
            return
        # so large that spikes flip, without which a step would show little
        step = replace(self._step, eps=0.3, noise=0.1)
        shape = (4, 4, 3, 8, 8)
        mine = ModeTask(step, self._peer, EXACT, shape)
        draw = partial(_drawn, step.mode, mine.seeds)
        peer = replace(step, build=self._peer)
        wanted = PublishedTask(peer, shape, precision=EXACT, draw=draw)
        for module in (*mine.net.modules(), *wanted.net.modules()):
            if isinstance(module, DLIFNode):
                module.input_gain.requires_grad_(False)
        check_same_steps(mine, wanted)


class UncheckedTask(ModeTask):
    """The same on a network that has no published loop: ``training_step`` compares the mode."""

    def check(self) -> None:
        """Nothing."""


def _drawn(mode: str, seeds: SampleSeeds, x: Tensor) -> Tensor:
    """The noise that the attack of a mode draws: after a seed for the network's own randomness, if
    it runs one.
    """
    private = private_generator(seeds, x.device)
    if mode != "gaussian":
        draw_seed(private)
    draw = rand if mode == "pgd_at" else randn
    return draw(x.shape, private, dtype=x.dtype, device=x.device)


class FloorTask(TrainingTask):
    """The convolutions and linear layers of an adversarial step alone, each on the input that it
    has there.

    Crafting takes their gradient to the input, the clean and the perturbed pass that and those of
    the weights, without the first layer's to the images: what no neuron, loss or attack can go
    below in the same precision.
    """

    def __init__(
        self,
        build: Build,
        precision: Precision,
        shape: Shape,
    ) -> None:
        """Run the network once to have the inputs."""
        super().__init__(build(shape), shape, precision)
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        hooks = [
            module.register_forward_hook(self._note)
            for module in self.net.modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        with torch.no_grad(), self.autocast():
            SpikingClassifier(self.net, shape[0])(self.x)
        for hook in hooks:
            hook.remove()

    def _note(self, module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        x = arguments[0].detach()
        grad = torch.randn_like(output)
        self._calls.append((module, x, grad))

    def forward(self) -> Tensor:
        """All of it, both directions; a step has them one after the other as well."""
        self._pass(wants_images=True, wants_weights=False)
        self._pass(wants_images=False, wants_weights=True)
        self._pass(wants_images=False, wants_weights=True)
        return self.x

    def backward(self, loss: Tensor) -> None:
        """Nothing: see :meth:`forward`."""

    def _pass(self, *, wants_images: bool, wants_weights: bool) -> None:
        graphs = []
        with self.autocast():
            for number, (module, x, grad) in enumerate(self._calls):
                wanted: list[Tensor] = []
                if wants_weights:
                    wanted += module.parameters()
                x = x.detach()
                if number > 0 or wants_images:
                    wanted.append(x.requires_grad_())
                graphs.append((module(x), wanted, grad))
        for output, wanted, grad in reversed(graphs):
            torch.autograd.grad(output, wanted, grad)


def _small(neuron: Callable[[int], nn.Module], shape: Shape) -> nn.Module:
    torch.manual_seed(0)
    return SmallConvNet(shape[2:], 10, T=shape[0], spiking_neuron=neuron)


def mode_steps() -> Methods:
    """The step of every mode on a small network, each followed by the published loop on LIFNodes if
    there is one.
    """
    modes: tuple[ModeName, ...] = ("none", "gaussian", "at", "rat", "pgd_at", "trades", "certified")
    peer = partial(_small, lif_node)
    steps: Methods = {}
    for mode in modes:
        steps[mode] = partial(ModeTask, Step(mode, partial(_small, DLIFNode)), peer, Precision())
        if mode != "certified":
            steps[f"{mode}, textbook loop"] = partial(PublishedTask, Step(mode, peer))
    joint: dict[str, BoundsBackend] = {"": "auto", ", plain torch": "reference"}
    for added, backend in joint.items():
        step = Step("certified", partial(_small, DLIFNode))
        make = partial(ModeTask, step, peer, Precision(), joint=backend)
        steps[f"certified, joint bounds{added}"] = make
    return steps


def _strided(neuron: Callable[[int], nn.Module], shape: Shape) -> nn.Module:
    """The network of the preset ``digits_joint``."""
    torch.manual_seed(0)
    return SmallConvNet(
        shape[2:],
        10,
        T=shape[0],
        spiking_neuron=neuron,
        channels=(16, 64),
        strides=(1, 2),
        batch_norm=False,
    )


def joint_steps() -> Methods:
    """The step of the preset ``digits_joint`` by neuron, each beside an adversarial one of the same
    network, and beside that of the preset ``digits`` and of intervals.
    """
    steps: Methods = {}
    peer = partial(_small, lif_node)
    for name, spiking in (("LIF", lif_node), ("DLIF", DLIFNode)):
        mine = partial(_strided, spiking)
        certified = partial(
            ModeTask,
            Step("certified", mine, eps=0.105),
            peer,
            Precision(),
            kappa=0.0,
            surrogate_width=0.5,
        )
        adversarial = {
            f"{name}, adversarial": mine,
            f"{name}, network of digits, adversarial": partial(_small, spiking),
        }
        steps[name] = partial(certified, joint="auto")
        for method, build in adversarial.items():
            steps[method] = partial(UncheckedTask, Step("at", build, eps=0.1), peer, Precision())
        steps[f"{name}, intervals"] = certified
    return steps


def adversarial_steps(architecture: str) -> Methods:
    """Steps of single-step adversarial training with MS-MPPD at 4/255, by who makes them, and their
    floor.
    """
    mine = partial(convolutional_network, architecture, FUSED)
    published = partial(convolutional_network, architecture, "textbook loop")
    step = Step("at", mine, eps=4 / 255)
    steps: Methods = {}
    for added, precision in PRECISIONS.items():
        steps[f"sj_robust{added}"] = partial(ModeTask, step, published, precision)
        floor = f"convolutions and linear layers alone{added}"
        steps[floor] = partial(FloorTask, mine, precision)
    steps["published loop"] = partial(PublishedTask, replace(step, build=published))
    return steps
