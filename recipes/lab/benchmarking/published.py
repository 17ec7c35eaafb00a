"""The training steps that the papers' code runs, written down plainly, as peers to measure
against.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.benchmarking.networks import Precision, TrainingTask
from sj_robust._host import functional, neuron
from sj_robust.neuron import DLIFNode

if TYPE_CHECKING:
    from sj_robust.training.modes import ModeName

TRADES_WEIGHT = 6.0
Draw = Callable[[Tensor], Tensor]
"""Noise in the shape of the images."""


@dataclass(frozen=True)
class Step:
    """A training step of a mode on a network for images of shape [T, N, C, H, W].

    ``eps`` is the radius of the attack, and the standard deviation of the noise of ``"gaussian"``;
    ``noise`` is that of the noise where ``"at"``, ``"rat"`` and ``"trades"`` start.
    """

    mode: "ModeName"
    build: Callable[[Sequence[int]], nn.Module]
    eps: float = 8 / 255
    noise: float = 0.001


class PublishedTask(TrainingTask):
    """A step as the code of its paper makes it, with a neuron and a batch norm that run one after
    the other.

    Attacks run the network in evaluation mode, its neurons excepted, which have a gradient in
    training mode only on SpikingJelly 0.0.0.0.14; the losses run all of it in training mode.

    Source: Ding et al. (ICML 2024), Madry et al. (ICLR 2018), Zhang et al. (ICML 2019), Ding et
    al. (NeurIPS 2022).
    """

    def __init__(
        self,
        step: Step,
        shape: Sequence[int],
        *,
        precision: Precision = Precision(),  # noqa: B008  # it is frozen
        draw: Draw | None = None,
    ) -> None:
        """Build the network and draw the images; ``draw`` None takes torch's generator."""
        from sj_robust.training import MODES  # brings Accelerate and more

        self._step, self._mode, self._T = step, MODES[step.mode], shape[0]
        super().__init__(step.build(shape), shape, precision, weight_decay=self._mode.weight_decay)
        self._draw: Draw = draw or (torch.rand_like if step.mode == "pgd_at" else torch.randn_like)
        self._nodes = [
            module for module in self.net.modules() if isinstance(module, neuron.LIFNode | DLIFNode)
        ]

    def forward(self) -> Tensor:
        """Crafts the perturbed images; the loss."""
        self.net.eval()
        for node in self._nodes:
            node.train()
        x_perturbed = self.crafted()
        self.net.train()
        return self.loss(x_perturbed)

    def backward(self, loss: Tensor) -> None:
        """Gradients, a step of the optimizer, the retraction."""
        super().backward(loss)
        if self._mode.retraction > 0:
            self.retract(self._mode.retraction)

    def logits(self, images: Tensor) -> Tensor:
        """Mean over time of the outputs for images that are repeated before the first
        convolution.
        """
        functional.reset_net(self.net)
        outputs: Tensor = self.net(images.unsqueeze(0).repeat(self._T, 1, 1, 1, 1))
        return outputs.mean(0)

    def crafted(self) -> Tensor:
        """The images that the loss compares with the clean ones, or takes in their place."""
        x, eps, noise = self.x, self._step.eps, self._step.noise
        match self._step.mode:
            case "none":
                return x
            case "gaussian":
                return x + eps * self._draw(x)
            case "at" | "rat":  # one step, not projected, after a clean pass that nothing uses
                with torch.no_grad():
                    self.logits(x)
                start = x + noise * self._draw(x)
                return (start + eps * self._sign(start, self._entropy)).clamp(0, 1)
            case "pgd_at":
                start = (x + eps * (2 * self._draw(x) - 1)).clamp(0, 1)
                return self._ascended(start, self._entropy)
            case "trades":
                with torch.no_grad():
                    clean = self.logits(x).log_softmax(1)
                divergence = partial(_divergence, clean, reduction="sum")
                return self._ascended(x + noise * self._draw(x), divergence)
        raise ValueError(f"there is no published loop of mode {self._step.mode}")

    def loss(self, x_perturbed: Tensor) -> Tensor:
        """Cross entropy of one kind of images, TRADES, or both cross entropies and MS-MPPD of the
        last spiking layer.
        """
        if self._mode.loss == "trades":
            clean, perturbed = self.logits(self.x), self.logits(x_perturbed).log_softmax(1)
            divergence = _divergence(clean.log_softmax(1), perturbed, reduction="batchmean")
            return self._entropy(clean) + TRADES_WEIGHT * divergence
        if self._mode.rho == 0:
            return self._entropy(self.logits(x_perturbed))
        last, currents = self._nodes[-1], []
        hook = last.register_forward_pre_hook(lambda _, inputs: currents.append(inputs[0]))
        kappa = self._mode.kappa
        loss = kappa * self._entropy(self.logits(self.x))
        loss = loss + (1 - kappa) * self._entropy(self.logits(x_perturbed))
        hook.remove()
        decay = last.decay if isinstance(last, DLIFNode) else 1 - 1 / last.tau
        potential = torch.zeros_like(currents[0][0])
        square = torch.zeros_like(loss)
        for clean_current, current in zip(currents[0].detach(), currents[1], strict=True):
            potential = decay * potential + clean_current - current
            square = square + potential.square().mean() / self._T
        return loss + self._mode.rho * square

    @torch.no_grad()
    def retract(self, beta: float) -> None:
        """Step of every weight matrix W towards orthonormal rows: ``W + beta * (W - W W^T W)``.

        The linear layers have fewer than 200 rows, of which SNN-RAT's code takes all.
        """
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                matrix = module.weight.view(len(module.weight), -1)
                matrix.add_(matrix - matrix @ matrix.t() @ matrix, alpha=beta)

    def _ascended(self, at: Tensor, goal: Callable[[Tensor], Tensor]) -> Tensor:
        """Steps of eps / 4, each projected onto the ball and the box."""
        eps = self._step.eps
        for _ in range(self._mode.attack_steps):
            at = at + eps / 4 * self._sign(at, goal)
            at = torch.minimum(torch.maximum(at, self.x - eps), self.x + eps).clamp(0, 1)
        return at

    def _sign(self, images: Tensor, goal: Callable[[Tensor], Tensor]) -> Tensor:
        images = images.detach().requires_grad_()
        (grad,) = torch.autograd.grad(goal(self.logits(images)), images)
        return grad.sign()

    def _entropy(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.y)


def _divergence(log_clean: Tensor, logits: Tensor, *, reduction: str) -> Tensor:
    log_perturbed = logits.log_softmax(1)
    return F.kl_div(log_perturbed, log_clean, reduction=reduction, log_target=True)
