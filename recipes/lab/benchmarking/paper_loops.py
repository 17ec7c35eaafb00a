"""The loops that the papers' code runs for a batch, written down plainly, as peers to measure
against.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sj_robust._host import functional, neuron
from sj_robust.neuron import DLIFNode

Draw = Callable[[Tensor], Tensor]
"""Noise in the shape of the images."""


class PaperLoop:
    """Perturbed images and losses of one batch, each as the code of its paper makes it.

    Attacks run the network in evaluation mode, its neurons excepted, which have a gradient in
    training mode only on SpikingJelly 0.0.0.0.14; the losses run all of it in training mode.

    The network is one of LIF or DLIF neurons in step mode ``"m"`` that takes frames [T, N, C, H,
    W].

    Source: Ding et al. (ICML 2024), Madry et al. (ICLR 2018), Zhang et al. (ICML 2019).
    """

    def __init__(self, net: nn.Module, T: int) -> None:
        """Find the neurons; see the class."""
        self._net, self._T = net, T
        self._nodes = [
            module for module in net.modules() if isinstance(module, neuron.LIFNode | DLIFNode)
        ]

    def logits(self, images: Tensor) -> Tensor:
        """Mean over time of the outputs for images that are repeated before the first
        convolution.
        """
        functional.reset_net(self._net)
        outputs: Tensor = self._net(images.unsqueeze(0).repeat(self._T, 1, 1, 1, 1))
        return outputs.mean(0)

    def single_step(self, x: Tensor, y: Tensor, eps: float, noise: float, draw: Draw) -> Tensor:
        """A clean pass that nothing uses, then one step from ``x + noise * draw(x)``, not projected
        onto the ball.
        """
        self._evaluating()
        with torch.no_grad():
            self.logits(x)
        start = x + noise * draw(x)
        return (start + eps * self._sign(start, lambda z: F.cross_entropy(z, y))).clamp(0, 1)

    def pgd(self, x: Tensor, y: Tensor, eps: float, steps: int, draw: Draw) -> Tensor:
        """Steps of eps / 4 from a uniform start in the ball; ``draw`` gives numbers in [0, 1)."""
        start = (x + eps * (2 * draw(x) - 1)).clamp(0, 1)
        return self._ascended(start, x, eps, steps, lambda z: F.cross_entropy(z, y))

    def trades(self, x: Tensor, eps: float, steps: int, noise: float, draw: Draw) -> Tensor:
        """Steps of eps / 4 away from the clean prediction."""
        self._evaluating()
        with torch.no_grad():
            clean = self.logits(x).log_softmax(1)

        def goal(logits: Tensor) -> Tensor:
            return F.kl_div(logits.log_softmax(1), clean, reduction="sum", log_target=True)

        return self._ascended(x + noise * draw(x), x, eps, steps, goal)

    def paper_loss(
        self, x: Tensor, y: Tensor, x_perturbed: Tensor, *, kappa: float, rho: float
    ) -> Tensor:
        """Both cross entropies, and MS-MPPD of the last spiking layer."""
        self._net.train()
        currents: list[Tensor] = []
        hook = self._nodes[-1].register_forward_pre_hook(
            lambda _, inputs: currents.append(inputs[0])
        )
        loss = kappa * F.cross_entropy(self.logits(x), y)
        loss = loss + (1 - kappa) * F.cross_entropy(self.logits(x_perturbed), y)
        hook.remove()
        last = self._nodes[-1]
        decay = last.decay if isinstance(last, DLIFNode) else 1 - 1 / last.tau
        clean, perturbed = currents[0].detach(), currents[1]
        potential = torch.zeros_like(clean[0])
        square = torch.zeros_like(loss)
        for t in range(self._T):
            potential = decay * potential + clean[t] - perturbed[t]
            square = square + potential.square().mean() / self._T
        return loss + rho * square

    def entropy_loss(self, images: Tensor, y: Tensor) -> Tensor:
        """Cross entropy of one kind of images."""
        self._net.train()
        return F.cross_entropy(self.logits(images), y)

    def trades_loss(self, x: Tensor, y: Tensor, x_perturbed: Tensor, *, weight: float) -> Tensor:
        """Cross entropy of the clean images and the divergence between both predictions."""
        self._net.train()
        clean = self.logits(x)
        log_perturbed = self.logits(x_perturbed).log_softmax(1)
        return F.cross_entropy(clean, y) + weight * F.kl_div(
            log_perturbed, clean.softmax(1), reduction="batchmean"
        )

    def _evaluating(self) -> None:
        self._net.eval()
        for node in self._nodes:
            node.train()

    def _ascended(
        self, start: Tensor, x: Tensor, eps: float, steps: int, goal: Callable[[Tensor], Tensor]
    ) -> Tensor:
        self._evaluating()
        at = start
        for _ in range(steps):
            at = at + eps / 4 * self._sign(at, goal)
            at = torch.minimum(torch.maximum(at, x - eps), x + eps).clamp(0, 1)
        return at

    def _sign(self, images: Tensor, goal: Callable[[Tensor], Tensor]) -> Tensor:
        images = images.detach().requires_grad_()
        (grad,) = torch.autograd.grad(goal(self.logits(images)), images)
        return grad.sign()


@torch.no_grad()
def published_retraction(net: nn.Module, beta: float) -> None:
    """Step of every weight matrix W towards orthonormal rows: ``W + beta * (W - W W^T W)``, all
    rows at once.

    The linear layers have fewer than 200 rows, of which SNN-RAT's code takes all.

    Source: Ding et al. (NeurIPS 2022) and its code, re-implemented.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            matrix = module.weight.view(len(module.weight), -1)
            matrix.add_(matrix - matrix @ matrix.t() @ matrix, alpha=beta)
