"""Layers that run in one pass: batch norm and the DLIF neurons behind it, in a network that exists already.

No other file knows of it: hooks, estimators and messages find the neuron as they find it anywhere.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from sj_robust._host import layer
from sj_robust.neuron.dlif import DLIFNode
from sj_robust.ops.bn_dlif import BatchNorm, batch_norm_dlif_multi_step, can_fuse
from sj_robust.ops.bn_dlif.reference import normalise

__all__ = ["FusedSequential", "FusionReport", "fuse", "unfuse"]


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse` did, by the name of the batch norm.

    Attributes:
        fused: Batch norms that run in one pass with the neuron behind them, with that neuron's name.
        skipped: Batch norms that stay as they are, with the reason.
    """

    fused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs a batch norm and the DLIFNode right behind it in one pass where it can.

    Same modules, names, parameters, results and errors as ``nn.Sequential``. A pair runs in one pass in step mode
    ``"m"`` on the CPU with the compiled kernel; otherwise, and whenever somebody looks between the two, one after the
    other. Who looks is who has a hook on either, unless it is a method of an object whose ``active`` is False at that
    time. Hooks on every module at once (``torch.nn.modules.module.register_module_forward_hook``), which torch has for
    debugging alone, cannot be found by public means and miss the two: call :func:`unfuse` first.

    Equation: see :func:`sj_robust.ops.bn_dlif.batch_norm_dlif_multi_step`.

    Shapes: those of the modules inside.

    Examples:
        >>> import torch
        >>> net = FusedSequential(layer.BatchNorm2d(3, step_mode="m"), DLIFNode(T=4))
        >>> net(torch.randn(4, 2, 3, 5, 5)).shape
        torch.Size([4, 2, 3, 5, 5])
    """

    def forward(self, input: Any) -> Any:
        """Run the modules one after the other, those of a stage in one pass."""
        modules = list(self)
        while modules:
            stage = modules[:_STAGE]
            output = _in_one_pass(stage, input)
            if output is None:
                stage = modules[:1]
                output = stage[0](input)
            input = output
            del modules[: len(stage)]
        return input


def fuse(net: nn.Module) -> FusionReport:
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
        >>> fuse(net).fused
        {'1': '2'}
        >>> unfuse(net)
        >>> type(net).__name__
        'Sequential'
    """
    report = FusionReport()
    for parent_name, parent in list(net.named_modules()):
        prefix = f"{parent_name}." if parent_name else ""
        members = parent.named_modules(remove_duplicate=False)
        children = [(prefix + name, child) for name, child in members if name and "." not in name]
        followers: list[tuple[str, nn.Module | None]] = [*children[1:], ("", None)]
        for (name, module), (follower_name, follower) in zip(children, followers, strict=False):
            reason = _unfusable_reason(module, parent, follower)
            if reason is None:
                report.fused[name] = follower_name
                parent.__class__ = FusedSequential
            elif any("BatchNorm" in cls.__name__ for cls in type(module).__mro__):
                report.skipped[name] = reason
    return report


def unfuse(net: nn.Module) -> None:
    """Undo :func:`fuse`: every :class:`FusedSequential` becomes an ``nn.Sequential`` again.

    Args:
        net: A network, changed in place.

    Examples:
        >>> net = FusedSequential()
        >>> unfuse(net)
        >>> type(net).__name__
        'Sequential'
    """
    for module in net.modules():
        if type(module) is FusedSequential:
            module.__class__ = nn.Sequential  # type: ignore[assignment]  # back to its base, same layout


_STAGE = 2  # modules of the longest stage
_DIMENSIONS = {layer.BatchNorm1d: 4, layer.BatchNorm2d: 5, layer.BatchNorm3d: 6}  # of [T, N, C, *]


def _unfusable_reason(module: nn.Module, parent: nn.Module, follower: nn.Module | None) -> str | None:
    if type(module) not in _DIMENSIONS:
        return f"{type(module).__module__}.{type(module).__name__} is not a BatchNorm of SpikingJelly's layer module"
    if type(parent) not in (nn.Sequential, FusedSequential):
        return f"stands in a {type(parent).__name__}, whose forward may run something between it and a neuron"
    if not isinstance(follower, DLIFNode):
        return f"is followed by {'nothing' if follower is None else type(follower).__name__}, not by a DLIFNode"
    return None


def _in_one_pass(stage: list[nn.Module], x_seq: Any) -> Tensor | None:
    """Output of a stage in one pass; None if the modules are no stage, or have to run one after the other."""
    if len(stage) < _STAGE or type(stage[0]) not in _DIMENSIONS or not isinstance(stage[1], DLIFNode):
        return None
    norm: Any = stage[0]
    node = stage[1]
    if not isinstance(x_seq, Tensor) or x_seq.ndim != _DIMENSIONS[type(norm)] or x_seq.shape[2] != norm.num_features:
        return None
    if type(node).multi_step_forward is not DLIFNode.multi_step_forward or node.backend not in ("auto", "cpp"):
        return None
    if norm.step_mode != "m" or node.step_mode != "m" or _is_watched(norm) or _is_watched(node):
        return None
    values = _values(norm)
    single_value = values.use_batch_statistics and x_seq.numel() == x_seq.shape[2]  # torch refuses it in its own words
    if single_value or not can_fuse(x_seq, values, node._surrogate()):
        return None
    spike_seq = _run(node, x_seq, values)
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return spike_seq


def _run(node: DLIFNode, x_seq: Tensor, values: BatchNorm) -> Tensor:
    """The neuron's own forward, with batch norm in its operator; what stands in for that forward gets its currents."""
    done = False

    def operator(_: Tensor, *arguments: Any, threads_per_block: int | None = None, **constants: Any) -> Any:
        nonlocal done  # the block size of a CUDA kernel means nothing here
        outputs = batch_norm_dlif_multi_step(x_seq, values, *arguments, **constants)
        done = True
        return outputs

    currents = x_seq
    if "multi_step_forward" in vars(node):
        unchanged = replace(values, running_mean=None, running_var=None) if values.use_batch_statistics else values
        currents = normalise(x_seq, unchanged)
    node._operator = operator
    try:
        spike_seq = node.multi_step_forward(currents)
    finally:
        del node._operator
    if not done:
        normalise(x_seq.detach(), values)  # the running statistics move all the same
    return spike_seq


def _values(norm: Any) -> BatchNorm:
    """The batch norm of this call, by the rules of torch's own forward; momentum None is a plain average."""
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


# torch has no public way to ask for a module's hooks; these are the names in every release since 2.0.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_watched(module: nn.Module) -> bool:
    """Whether anything but the module itself would have to run when it is called."""
    hooks = (hook for name in _HOOKS for hook in getattr(module, name).values())
    return "forward" in vars(module) or any(getattr(getattr(hook, "__self__", None), "active", True) for hook in hooks)
