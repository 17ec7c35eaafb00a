"""The training steps that the papers' code runs, written down plainly, as peers to measure
against.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.benchmarking.networks import Precision, TrainingTask
from lab.benchmarking.task import Shape
from sj_robust.core.host import functional, neuron
from sj_robust.neuron import DLIFNode

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
