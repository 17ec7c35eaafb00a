"""The training step of every mode, and the published loop on SpikingJelly's own neuron where there
is one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor, nn

from lab.benchmarking.layers import lif_node
from lab.benchmarking.networks import (
    FUSED,
    PRECISIONS,
    Precision,
    TrainingTask,
    check_same_steps,
    convolutional_network,
)
from lab.benchmarking.paper_loops import Draw, PaperLoop, published_retraction
from sj_robust.attacks import SampleSeeds
from sj_robust.classifier import SpikingClassifier
from sj_robust.models import SmallConvNet
from sj_robust.neuron import DLIFNode
from sj_robust.randomness import draw_seed, private_generator, rand, randn

if TYPE_CHECKING:
    from sj_robust.training.modes import ModeName

_TRADES_WEIGHT = 6.0

Build = Callable[[Sequence[int]], nn.Module]
"""Makes a network for images of shape [T, N, C, H, W]."""
Steps = dict[str, Callable[[Sequence[int]], TrainingTask]]
"""Makes the task of a step from that shape, by its name."""


class ModeTask(TrainingTask):
    """One step of this package: perturbed images, both passes, loss, optimizer, retraction.

    It is made of the parts that the training engine calls, on a network of DLIF neurons behind
    batch norm. ``peer`` makes the network of the published loop that it must equal. ``eps`` is the
    radius of the attack, and the standard deviation of the noise of ``"gaussian"``; ``noise`` is
    that of the noise where ``"at"``, ``"rat"`` and ``"trades"`` start.
    """

    def __init__(
        self,
        mode: "ModeName",
        build: Build,
        peer: Build,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        eps: float = 8 / 255,
        noise: float = 0.001,
        **precision: Unpack[Precision],
    ) -> None:
        """Build the network and draw the images."""
        from sj_robust import training  # brings Accelerate and more, which layers do not need

        self._mode, self._build, self._peer = training.MODES[mode], build, peer
        self._net = build(shape).to(dtype)
        super().__init__(
            self._net, shape, dtype, weight_decay=self._mode.weight_decay, fused=True, **precision
        )
        project = mode not in ("at", "rat")  # as published
        certified = (
            self._mode.loss == "certified"
        )  # with bounds, and without MS-MPPD nothing to attack for
        self._attack = (
            None
            if certified
            else training.training_attack(mode, eps=eps, noise_std=noise, project=project)
        )
        self._objective = training.Objective(
            SpikingClassifier(self._net, shape[0]),
            kappa=self._mode.kappa,
            rho=self._mode.rho,
            loss=self._mode.loss,
            trades_weight=_TRADES_WEIGHT,
            certified_eps=eps if certified else None,
        )
        self._retract = training.retract_
        self._seeds = SampleSeeds(range(shape[1]))

    def forward(self) -> Tensor:
        """Crafts the perturbed images; the loss."""
        x_perturbed = None
        with self._autocast():
            if self._attack is not None:
                x_perturbed = self._attack(
                    self._objective.classifier, self._x, self._y, generator=self._seeds
                )
            total: Tensor = self._objective(self._x, self._y, x_perturbed).total
        return total

    def backward(self, loss: Tensor) -> None:
        """Gradients, a step of the optimizer, the retraction."""
        super().backward(loss)
        if self._mode.retraction > 0:
            self._retract(self._net, self._mode.retraction, torch.Generator().manual_seed(0))

    def check(self) -> None:
        """Compare with the published loop in float64, from the same noise; raises ValueError.

        DLIF's gains do not learn there: LIFNode has none. That of ``certified`` is on no spiking
        network; its loss is checked by the tests alone.
        """
        if self._mode.loss == "certified":
            return
        shape, name = (4, 4, 3, 8, 8), self._mode.name
        # so large that spikes flip, without which a step would show little
        eps, noise = 0.3, 0.1
        mine = ModeTask(
            name, self._build, self._peer, shape, dtype=torch.float64, eps=eps, noise=noise
        )
        draw = partial(_drawn, name, mine._seeds)
        wanted = PublishedTask(
            name, self._peer, shape, dtype=torch.float64, draw=draw, eps=eps, noise=noise
        )
        for module in (*mine._net.modules(), *wanted._net.modules()):
            if isinstance(module, DLIFNode):
                module.input_gain.requires_grad_(False)
        check_same_steps(f"the step of mode {name}", mine, wanted)


class PublishedTask(TrainingTask):
    """The same step as the code of its paper makes it, with a neuron and a batch norm that run one
    after the other.

    ``draw`` makes the noise; None takes torch's global generator.
    """

    def __init__(
        self,
        mode: "ModeName",
        build: Build,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        eps: float = 8 / 255,
        noise: float = 0.001,
        draw: Draw | None = None,
    ) -> None:
        """Build the network and draw the images."""
        from sj_robust.training import MODES  # as above

        self._mode, self._eps, self._noise = MODES[mode], eps, noise
        self._net = build(shape).to(dtype)
        super().__init__(self._net, shape, dtype, weight_decay=self._mode.weight_decay)
        self._loop = PaperLoop(self._net, shape[0])
        self._draw: Draw = draw or (torch.rand_like if mode == "pgd_at" else torch.randn_like)

    def forward(self) -> Tensor:
        """Crafts the perturbed images; the loss."""
        x, y, loop = self._x, self._y, self._loop
        eps, steps = self._eps, self._mode.attack_steps
        weights = {"kappa": self._mode.kappa, "rho": self._mode.rho}
        match self._mode.name:
            case "none":
                return loop.entropy_loss(x, y)
            case "gaussian":
                return loop.paper_loss(x, y, x + eps * self._draw(x), **weights)
            case "at" | "rat":
                return loop.paper_loss(
                    x, y, loop.single_step(x, y, eps, self._noise, self._draw), **weights
                )
            case "pgd_at":
                return loop.entropy_loss(loop.pgd(x, y, eps, steps, self._draw), y)
            case "trades":
                x_perturbed = loop.trades(x, eps, steps, self._noise, self._draw)
                return loop.trades_loss(x, y, x_perturbed, weight=_TRADES_WEIGHT)
            case name:
                raise ValueError(
                    f"there is no published loop of mode {name} on SpikingJelly's neuron"
                )

    def backward(self, loss: Tensor) -> None:
        """Gradients, a step of the optimizer, the retraction."""
        super().backward(loss)
        if self._mode.retraction > 0:
            published_retraction(self._net, self._mode.retraction)


class FloorTask(TrainingTask):
    """The convolutions and linear layers of an adversarial step alone, each on the input that it
    has there.

    Crafting takes their gradient to the input, the clean and the perturbed pass that and those of
    the weights, without the first layer's to the images: what no neuron, loss or attack can go
    below in the same precision.
    """

    def __init__(self, build: Build, shape: Sequence[int], **precision: Unpack[Precision]) -> None:
        """Run the network once to have the inputs."""
        net = build(shape)
        super().__init__(net, shape, torch.float32, **precision)
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []

        def note(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            self._calls.append((module, arguments[0].detach(), torch.randn_like(output)))

        hooks = [
            m.register_forward_hook(note)
            for m in net.modules()
            if isinstance(m, nn.Conv2d | nn.Linear)
        ]
        with torch.no_grad(), self._autocast():
            SpikingClassifier(net, shape[0])(self._x)
        for hook in hooks:
            hook.remove()

    def forward(self) -> Tensor:
        """All of it, both directions; a step has them one after the other as well."""
        for crafts in (True, False, False):
            outputs = []
            with self._autocast():
                for number, (module, x, grad) in enumerate(self._calls):
                    x = x.detach().requires_grad_(crafts or number > 0)
                    wanted = [x, *(() if crafts else module.parameters())]
                    outputs.append(
                        (module(x), [tensor for tensor in wanted if tensor.requires_grad], grad)
                    )
            for output, wanted, grad in reversed(outputs):
                torch.autograd.grad(output, wanted, grad)
        return self._x

    def backward(self, loss: Tensor) -> None:
        """Nothing: see :meth:`forward`."""


def _small(neuron: Callable[..., nn.Module], shape: Sequence[int]) -> nn.Module:
    torch.manual_seed(0)
    return SmallConvNet(shape[2:], 10, T=shape[0], spiking_neuron=neuron)


def _drawn(mode: str, seeds: SampleSeeds, x: Tensor) -> Tensor:
    """The noise that the attack of a mode draws: after a seed for the network's own randomness, if
    it runs one.
    """
    private = private_generator(seeds, x.device)
    if mode != "gaussian":
        draw_seed(private)
    return (rand if mode == "pgd_at" else randn)(x.shape, private, dtype=x.dtype, device=x.device)


_MODES: "tuple[ModeName, ...]" = ("none", "gaussian", "at", "rat", "pgd_at", "trades")
_SMALL: tuple[Build, Build] = (
    partial(_small, DLIFNode),
    partial(_small, lif_node),
)

STEP_PEERS: dict[str, str] = {mode: f"{mode}, textbook loop" for mode in _MODES}
"""Name of the published loop of every mode."""

TRAINING_STEPS: Steps = {}
"""Tasks by the name of the mode, each followed by its published loop if it has one, on a small
network and one of LIFNodes."""

for _mode in _MODES:
    TRAINING_STEPS[_mode] = partial(ModeTask, _mode, *_SMALL)
    TRAINING_STEPS[STEP_PEERS[_mode]] = partial(PublishedTask, _mode, _SMALL[1])
TRAINING_STEPS["certified"] = partial(ModeTask, "certified", *_SMALL)


def adversarial_steps(architecture: str) -> Steps:
    """Steps of single-step adversarial training with MS-MPPD at 4/255, by who makes them, and their
    floor.
    """
    mine, published = (
        partial(convolutional_network, architecture, neuron) for neuron in (FUSED, "textbook loop")
    )
    steps: Steps = {}
    for added, precision in PRECISIONS.items():
        steps[f"sj_robust{added}"] = partial(
            ModeTask, "at", mine, published, eps=4 / 255, **precision
        )
        steps[f"convolutions and linear layers alone{added}"] = partial(
            FloorTask, mine, **precision
        )
    return steps | {"published loop": partial(PublishedTask, "at", published, eps=4 / 255)}
