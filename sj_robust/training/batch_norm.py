"""Batch norm on several processes."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm

__all__ = ["measure_statistics", "share_buffers"]


def share_buffers(net: nn.Module) -> None:
    """Give every process the floating-point buffers of the first, in one message; only where there
    are processes.
    """
    buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    if _processes() == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.broadcast(flat, 0)
    sizes = [buffer.numel() for buffer in buffers]
    for buffer, values in zip(buffers, torch.split(flat, sizes), strict=True):
        buffer.copy_(values.view_as(buffer))


@torch.no_grad()
def measure_statistics(classifier: nn.Module, batches: Iterable[Tensor]) -> None:
    """Recompute the running statistics of every batch norm with the current weights.
    重新统计批归一化的均值与方差。

    Equation: ``running_mean`` is the mean over the batches of their means, ``running_var`` that of
    their unbiased variances; the moving average that they were before lags behind the weights. All
    other layers are in evaluation mode, as they will be when the statistics are used.

    Args:
        classifier: The network, which is in training mode afterwards.
        batches: Images, batch by batch; at least one.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576), section 3.

    Examples:
        >>> net = nn.BatchNorm1d(1)
        >>> measure_statistics(net, [torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [7.0]])])
        >>> net.running_mean, net.running_var
        (tensor([3.]), tensor([5.]))
    """
    modules = [module for module in classifier.modules() if isinstance(module, BatchNorm)]
    norms = [module for module in modules if module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    classifier.eval()
    for norm in norms:
        norm.train()
    for x in batches:
        classifier(x)
    classifier.train()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
