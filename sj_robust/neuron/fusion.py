"""Batch norm and the DLIF neurons behind it in one pass, in a network that exists already."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from spikingjelly.activation_based import layer
from torch import nn

from sj_robust.neuron import DLIFNode
from sj_robust.ops.bn_dlif import BatchNorm, batch_norm_dlif_multi_step, can_fuse

__all__ = ["FusedSequential", "FusionReport", "fuse_batch_norm", "unfuse_batch_norm"]


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse_batch_norm` did, by the name of the batch norm.

    Attributes:
        fused: Batch norms that run in one pass with the neuron behind them, with that neuron's name.
        skipped: Batch norms that stay as they are, with the reason.
    """

    fused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs a batch norm and the DLIFNode right behind it in one pass where it can.

    Same modules, names, parameters and results as ``nn.Sequential``. A pair runs in one pass in step mode ``"m"`` on
    the CPU with the compiled kernel; otherwise, and whenever somebody looks between the two (a hook on either; those of
    an ``MPPDMonitor`` only in its runs and on the layers it follows), one after the other.

    Equation: see :func:`sj_robust.ops.bn_dlif.batch_norm_dlif_multi_step`.

    Shapes: those of the modules inside.

    Examples:
        >>> net = FusedSequential(layer.BatchNorm2d(3, step_mode="m"), DLIFNode(T=4))
        >>> net(torch.randn(4, 2, 3, 5, 5)).shape
        torch.Size([4, 2, 3, 5, 5])
    """

    def forward(self, input: Any) -> Any:
        """Run the modules one after the other, pairs in one pass."""
        modules = list(self)
        while modules:
            module = modules.pop(0)
            fused = _run_pair(module, modules[0], input) if modules else None
            if fused is not None:
                input = fused
                del modules[0]
            else:
                input = module(input)
        return input


def fuse_batch_norm(net: nn.Module) -> FusionReport:
    """Let every batch norm of a network run in one pass with the DLIF neurons right behind it.

    Only neighbours in an ``nn.Sequential`` are taken, where nothing can come between the two. Parameters, buffers,
    ``state_dict`` keys, hooks and results stay what they were (spikes within the rounding of batch norm).
    将 BatchNorm 与其后的 DLIF 神经元融合为一次计算，``state_dict`` 不变。

    Args:
        net: A network, changed in place: its ``nn.Sequential`` become :class:`FusedSequential`.

    Returns:
        What was fused and what was not, by module name. Whether a fused pair then runs in one pass is decided at each
        call: see :class:`FusedSequential`.

    Source: batch norm folded into its neighbour, as in every inference engine; here also in training.

    Examples:
        >>> net = nn.Sequential(layer.Conv2d(1, 3, 3), layer.BatchNorm2d(3), DLIFNode(T=4))
        >>> fuse_batch_norm(net).fused
        {'1': '2'}
        >>> unfuse_batch_norm(net)
        >>> type(net).__name__
        'Sequential'
    """
    report = FusionReport()
    for parent_name, parent in list(net.named_modules()):
        for name, module, follower_name, follower in _neighbours(parent_name, parent):
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            reason = _unfusable_reason(module, parent, follower)
            if reason is not None:
                report.skipped[name] = reason
            else:
                report.fused[name] = follower_name
                parent.__class__ = FusedSequential
    return report


def unfuse_batch_norm(net: nn.Module) -> None:
    """Undo :func:`fuse_batch_norm`: every :class:`FusedSequential` becomes an ``nn.Sequential`` again.

    Args:
        net: A network, changed in place.

    Examples:
        >>> net = FusedSequential()
        >>> unfuse_batch_norm(net)
        >>> type(net).__name__
        'Sequential'
    """
    for module in net.modules():
        if type(module) is FusedSequential:
            module.__class__ = nn.Sequential  # type: ignore[assignment]  # back to its base, same layout


_DIMENSIONS = {layer.BatchNorm1d: 4, layer.BatchNorm2d: 5, layer.BatchNorm3d: 6}  # of [T, N, C, *]


def _neighbours(parent_name: str, parent: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module | None]]:
    """Name of every child, the child, and both of the child that follows it ("" and None behind the last)."""
    prefix = f"{parent_name}." if parent_name else ""
    children = [(prefix + name, child) for name, child in parent._modules.items() if child is not None]
    followers: list[tuple[str, nn.Module | None]] = [*children[1:], ("", None)]
    for (name, child), (follower_name, follower) in zip(children, followers, strict=False):
        yield name, child, follower_name, follower


def _unfusable_reason(module: nn.Module, parent: nn.Module, follower: nn.Module | None) -> str | None:
    if type(module) not in _DIMENSIONS:
        return f"{type(module).__module__}.{type(module).__name__} is not a BatchNorm of SpikingJelly's layer module"
    if type(parent) not in (nn.Sequential, FusedSequential):
        return f"stands in a {type(parent).__name__}, whose forward may run something between it and a neuron"
    if not isinstance(follower, DLIFNode):
        return f"is followed by {'nothing' if follower is None else type(follower).__name__}, not by a DLIFNode"
    return None


def _run_pair(norm: nn.Module, node: nn.Module, x_seq: Any) -> torch.Tensor | None:
    """Output of the two in one pass, or None where they have to run one after the other."""
    if not (type(norm) in _DIMENSIONS and isinstance(node, DLIFNode) and isinstance(x_seq, torch.Tensor)):
        return None
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if type(node).multi_step_forward is not DLIFNode.multi_step_forward or node.backend not in ("auto", "cpp"):
        return None
    if norm.step_mode != "m" or node.step_mode != "m" or x_seq.ndim != _DIMENSIONS[type(norm)]:
        return None
    if x_seq.shape[2] != norm.num_features or _is_watched(norm) or _is_watched(node):
        return None
    values = _values(norm)
    single_value = values.use_batch_statistics and x_seq.numel() == x_seq.shape[2]  # torch refuses it in its own words
    if single_value or not can_fuse(x_seq, values, node._surrogate()):
        return None
    spike_seq = node.multi_step_forward(x_seq, partial(_operator, values))
    for owner in _hook_owners(node):  # none of them is awake, see _is_watched
        owner.unseen_call()
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return spike_seq


def _operator(
    norm: BatchNorm, x_seq: torch.Tensor, *arguments: Any, threads_per_block: int | None = None, **constants: Any
) -> Any:
    """``ops.dlif_multi_step`` with the batch norm before it; the block size of a CUDA kernel means nothing here."""
    return batch_norm_dlif_multi_step(x_seq, norm, *arguments, **constants)


def _values(norm: nn.modules.batchnorm._BatchNorm) -> BatchNorm:
    """The batch norm of this call, by the rules of ``_BatchNorm.forward``; momentum None is a plain average."""
    tracks = norm.training and norm.track_running_stats
    uses_buffers = tracks or not norm.training
    momentum = norm.momentum
    if momentum is None:
        batches = norm.num_batches_tracked if tracks else None
        momentum = 0.0 if batches is None else 1.0 / (float(batches) + 1.0)
    return BatchNorm(
        norm.weight,
        norm.bias,
        norm.running_mean if uses_buffers else None,
        norm.running_var if uses_buffers else None,
        norm.training or (norm.running_mean is None and norm.running_var is None),
        momentum,
        norm.eps,
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_watched(module: nn.Module) -> bool:
    """Whether anything but the module itself would have to run when it is called."""
    watched = any(getattr(owner, "needs_call", lambda: True)() for owner in _hook_owners(module))
    return (
        watched or "forward" in vars(module) or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]  # untyped in torch
    )


def _hook_owners(module: nn.Module) -> list[Any]:
    """Objects whose methods are hooks of the module; a plain function stands for itself."""
    return [getattr(hook, "__self__", hook) for name in _HOOKS for hook in getattr(module, name).values()]
