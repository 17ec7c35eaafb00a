"""The loop that the paper's code runs for a batch, written down plainly, as a peer to measure against."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sj_robust._host import functional
from sj_robust.neuron import DLIFNode

__all__ = ["published_losses"]


def published_losses(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    T: int,
    eps: float,
    noise: float,
    kappa: float = 0.5,
    rho: float = 1.0,
) -> Tensor:
    """Objective of one batch: a clean pass that nothing uses, the attack, then the clean and the perturbed pass.

    The image is repeated over time before the first convolution, which therefore runs T times.

    Args:
        net: Network of DLIF neurons in step mode ``"m"`` that takes frames [T, N, C, H, W].
        x: Images [N, C, H, W] in [0, 1].
        y: Labels [N].
        T: Number of time steps.
        eps: Step of the attack.
        noise: Standard deviation of the noise at its start.
        kappa: Weight of the clean cross entropy.
        rho: Weight of MS-MPPD.

    Returns:
        The loss, a scalar with a graph.

    Source: training loop of Ding et al. (ICML 2024) in its published code, re-implemented.
    """
    nodes = [module for module in net.modules() if isinstance(module, DLIFNode)]
    currents: list[Tensor] = []
    hook = nodes[-1].register_forward_pre_hook(lambda _, inputs: currents.append(inputs[0]))

    def logits(images: Tensor) -> Tensor:
        functional.reset_net(net)
        currents.clear()
        outputs: Tensor = net(images.unsqueeze(0).repeat(T, 1, 1, 1, 1))
        return outputs.mean(0)

    net.eval()
    with torch.no_grad():
        logits(x)
    start = (x + noise * torch.randn_like(x)).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(logits(start), y), start)
    x_perturbed = (start + eps * grad.sign()).clamp(0, 1).detach()
    net.train()
    loss = kappa * F.cross_entropy(logits(x), y)
    clean = currents[0].detach()
    loss = loss + (1 - kappa) * F.cross_entropy(logits(x_perturbed), y)
    potential = torch.zeros_like(clean[0])
    square = torch.zeros_like(loss)
    for current, perturbed in zip(clean, currents[0], strict=True):
        potential = nodes[-1].decay * potential + current - perturbed
        square = square + potential.square().mean() / T
    hook.remove()
    return loss + rho * square
