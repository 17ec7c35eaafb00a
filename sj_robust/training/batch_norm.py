"""Batch norm on several processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sj_robust.core.broadcast import along
from sj_robust.proofs import differentiable

BatchNorm = nn.modules.batchnorm._BatchNorm

__all__ = [
    "batch_statistics",
    "measure_statistics",
    "share_buffers",
    "synchronised_batch_norm",
]


@contextmanager
def synchronised_batch_norm(net: nn.Module) -> Iterator[None]:
    """Let batch norm in training mode take its statistics over the images of all processes.
    跨进程同步的批归一化。

    Equation, with ``n_r``, ``m_r``, ``v_r`` number, mean and variance of a channel's values on
    process r::

        mean = sum_r n_r m_r / sum_r n_r
        var = sum_r n_r (v_r + (m_r - mean)^2) / sum_r n_r

    and the gradient flows through both to every process, so one step of N processes is that of one
    process with all images. Every batch norm whose ``forward`` ends in torch's is taken, those of
    SpikingJelly's ``layer`` in both step modes included; one that would run fused with the neuron
    behind it runs by itself. Parameters, buffers, hooks and ``state_dict`` keys stay. In evaluation
    mode, in which attacks run, nothing is exchanged.

    ``torch.nn.SyncBatchNorm`` needs CUDA and knows no step modes; this runs on every device.

    Args:
        net: A network that is the same on every process; its batch norms are as before when the
            context ends.

    Source: Ioffe & Szegedy (2015); the pooling of means and variances of Chan, Golub and LeVeque
        (1983).

    Examples:
        >>> net = nn.Sequential(nn.BatchNorm1d(2))
        >>> with synchronised_batch_norm(net):
        ...     type(net[0]).__name__
        'SynchronisedBatchNorm1d'
        >>> type(net[0]).__name__
        'BatchNorm1d'
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    # Here and not at import, since torch loads its compiler for it.
    # untyped in torch
    forward = torch.compiler.disable(_Synchronised.forward)  # type: ignore[no-untyped-call]
    synchronised = type("_Synchronised", (_Synchronised,), {"forward": forward})
    for module in net.modules():
        if isinstance(module, BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            changed.append((module, type(module)))
            # Behind the module's own class, so that its handling of step modes still comes first.
            bases = (type(module), synchronised)
            module.__class__ = type(f"Synchronised{type(module).__name__}", bases, {})
    try:
        yield
    finally:
        for module, original in changed:
            module.__class__ = original


def batch_statistics(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance that a batch norm in training mode takes of its input [N, C, *];
    synchronised ones pool.
    """
    mean, var = differentiable.batch_statistics(module, x)
    if isinstance(module, _Synchronised) and _processes() > 1:
        count = x.numel() // x.shape[1]
        mean, var, _ = module._pooled(var, mean, count)
    return mean, var


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


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the values of all processes in training mode."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or _processes() == 1:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]  # untyped in torch
        dims = [0, *range(2, input.ndim)]
        wide = input if input.dtype == torch.float64 else input.float()
        own_var, own_mean = torch.var_mean(wide, dims, correction=0)
        own_count = input.numel() // input.shape[1]
        mean, var, count = self._pooled(own_var, own_mean, own_count)
        self._track(mean.detach(), var.detach(), count.detach())
        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
            shift = self.bias - mean * scale
        else:
            shift = -mean * scale
        scaled = wide * along(scale, 1, input.ndim)
        normalised = scaled + along(shift, 1, input.ndim)
        return normalised.to(input.dtype)

    def _pooled(self, var: Tensor, mean: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and number of the values of all processes, from those of this one."""
        number = mean.new_full((1,), count)
        row = torch.cat([mean, var, number])
        own = torch.zeros(_processes(), 1, dtype=row.dtype, device=row.device)
        own[dist.get_rank()] = 1
        rows: Tensor = _Sum.apply(own * row)  # type: ignore[no-untyped-call]  # untyped in torch
        channels = len(mean)
        means, variances, counts = torch.split(rows, [channels, channels, 1], dim=1)
        total = counts.sum()
        pooled_mean = (counts * means).sum(0) / total
        about_pooled_mean = variances + (means - pooled_mean).square()
        pooled_var = (counts * about_pooled_mean).sum(0) / total
        return pooled_mean, pooled_var, total

    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the running statistics as torch's batch norm does."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)
        unbiased = var * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class _Sum(torch.autograd.Function):
    """Sum over the processes; so is its gradient, since every process uses the result."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Sum.forward(ctx, grads[0])


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
