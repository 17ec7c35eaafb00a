"""Layers that run in one pass: batch norm, DLIF neurons and 2x2 average pooling, in a network that
exists already.

No other file knows of it: hooks, estimators and messages find the neuron as they find it anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from sj_robust._host import is_counted, layer
from sj_robust.neuron.dlif import DLIFNode
from sj_robust.ops import dlif_multi_step
from sj_robust.ops.bn_dlif import BatchNorm, apart, batch_norm_dlif_multi_step, can_fuse
from sj_robust.ops.bn_dlif.reference import normalise

__all__ = ["FusedSequential", "FusionReport", "fuse", "unfuse"]


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse` did, by the name of the batch norm or of the neuron.

    Attributes:
        fused: Batch norms that run in one pass with the neuron behind them, with that neuron's
            name.
        pooled: Neurons that run in one pass with the 2x2 average pooling behind them, with that
            pooling's name.
        skipped: Batch norms that stay as they are, with the reason.
    """

    fused: dict[str, str] = field(default_factory=dict)
    pooled: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs batch norm, DLIFNode and 2x2 average pooling behind each other in
    one pass if it can.

    Same modules, names, parameters, results and errors as ``nn.Sequential``. The three, or two of
    them, run in one pass in step mode ``"m"``, on the CPU with the compiled kernel and on CUDA with
    Triton; otherwise, and whenever somebody looks between them, one after the other. Who looks is
    who has a hook on one of them, unless it is a method of an object whose ``active`` is False at
    that time; with pre-hooks on the neuron, which look at its input alone, only the batch norm runs
    apart. Methods of an object whose ``needs_output`` is False, forward hooks of the neuron or
    pre-hooks that leave its input as it is, are called with the input that it has had and keep
    nothing apart. The counters of SpikingJelly 2.x (``op_counter``) look, too. Hooks on every
    module at once (``torch.nn.modules.module.register_module_forward_hook``), which torch has for
    debugging alone, cannot be found by public means and miss them: call :func:`unfuse` first. In
    bfloat16 and float16 one pass does not round what lies between the modules.

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
            input, count = _run_first(modules, input)
            modules = modules[count:]
        return input


def fuse(net: nn.Module) -> FusionReport:
    """Let batch norm, the DLIF neurons right behind it and the 2x2 average pooling behind those run
    in one pass.

    Each of the two around the neurons may be missing. Only neighbours in an ``nn.Sequential`` are
    taken, where nothing can come between them. Parameters, buffers, ``state_dict`` keys, hooks and
    results stay what they were (spikes within the rounding of batch norm).
    将 BatchNorm、其后的 DLIF 神经元和 2x2 平均池化融合为一次计算，``state_dict`` 不变。

    Args:
        net: A network, changed in place: its ``nn.Sequential`` become :class:`FusedSequential`.

    Returns:
        What was fused and what was not, by module name. Whether it then runs in one pass is decided
            at each call: see
        :class:`FusedSequential`.

    Source: batch norm folded into its neighbour, as in every inference engine; here also in
        training.

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
            elif (
                isinstance(module, DLIFNode)
                and type(parent) in (nn.Sequential, FusedSequential)
                and _pools(follower)
            ):
                report.pooled[name] = follower_name
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
            # back to its base, same layout
            module.__class__ = nn.Sequential  # type: ignore[assignment]


_DIMENSIONS = {layer.BatchNorm1d: 4, layer.BatchNorm2d: 5, layer.BatchNorm3d: 6}  # of [T, N, C, *]


def _unfusable_reason(
    module: nn.Module, parent: nn.Module, follower: nn.Module | None
) -> str | None:
    if type(module) not in _DIMENSIONS:
        return (
            f"{type(module).__module__}.{type(module).__name__} is not a BatchNorm of "
            "SpikingJelly's layer module"
        )
    if type(parent) not in (nn.Sequential, FusedSequential):
        return (
            f"stands in a {type(parent).__name__}, whose forward may run something between it "
            "and a neuron"
        )
    if not isinstance(follower, DLIFNode):
        return (
            f"is followed by {'nothing' if follower is None else type(follower).__name__}, not "
            "by a DLIFNode"
        )
    return None


def _pools(module: nn.Module | None) -> bool:
    """Whether it is an average over 2x2 neurons side by side."""
    pool: Any = module
    return type(module) is layer.AvgPool2d and (
        (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding))
        == ((2, 2), (2, 2), (0, 0))
        and not pool.ceil_mode
        and pool.divisor_override is None
    )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _run_first(modules: list[nn.Module], x_seq: Any) -> tuple[Any, int]:
    """Output of the first modules, as many as run together, and how many these are."""
    head: Any = modules[0]
    has_norm = type(head) in _DIMENSIONS
    node = modules[has_norm] if len(modules) > has_norm else None
    if not isinstance(node, DLIFNode) or not isinstance(x_seq, Tensor) or not _may_run_inside(node):
        return head(x_seq), 1
    norm = _norm_in_one_pass(head, node, x_seq) if has_norm else None
    if has_norm and norm is None:
        return head(x_seq), 1
    pool = modules[has_norm + 1] if len(modules) > has_norm + 1 else None
    averages = _averages(pool)
    pooled = averages and _pool_in_one_pass(node, x_seq, norm)
    if norm is not None:
        output = _run(node, x_seq, norm, pooled)
        if head.training and head.track_running_stats and head.num_batches_tracked is not None:
            head.num_batches_tracked.add_(1)
    elif pooled:
        output = _run_pooled(node, x_seq)
    else:
        output = node(x_seq)
    if averages and _is_replaced(node) and apart.can_pool(output):
        return apart.pool(output), has_norm + 2
    return output, has_norm + 1 + pooled


def _may_run_inside(node: DLIFNode) -> bool:
    """Whether the neuron's own operator may be replaced by one that does more."""
    return (
        node.step_mode == "m"
        and type(node).multi_step_forward is DLIFNode.multi_step_forward
        and "forward" not in node.__dict__
        and not is_counted()
    )


def _is_replaced(node: DLIFNode) -> bool:
    """Whether something stands in for the neuron's forward over a sequence, as an estimator
    does.
    """
    return "multi_step_forward" in node.__dict__


def _norm_in_one_pass(norm: Any, node: DLIFNode, x_seq: Tensor) -> BatchNorm | None:
    """The batch norm of this call, if it can run in one pass with the neuron."""
    if x_seq.ndim != _DIMENSIONS[type(norm)] or x_seq.shape[2] != norm.num_features:
        return None
    if norm.step_mode != "m" or _is_watched(norm) or "forward" in node.__dict__:
        return None
    if _needs_more_than_input(node, _HOOKS) or (_is_watched(node) and _is_replaced(node)):
        return None
    values = _values(norm)
    single_value = (
        values.use_batch_statistics and x_seq.numel() == x_seq.shape[2]
    )  # torch refuses it in its own words
    return None if single_value or not _can_fuse(x_seq, values, node) else values


def _averages(pool: Any) -> bool:
    """Whether this call of the pooling is an average over 2x2 neurons that nobody looks at."""
    return _pools(pool) and pool.step_mode == "m" and not _is_watched(pool)


def _pool_in_one_pass(node: DLIFNode, x_seq: Tensor, norm: BatchNorm | None) -> bool:
    """Whether an average can be taken in one pass with the neuron, whose spikes nobody else gets
    then.
    """
    if _is_replaced(node):
        return False
    others = [name for name in _HOOKS if name != "_forward_pre_hooks"]
    return not _needs_more_than_input(node, others) and _can_fuse(x_seq, norm, node, True)


def _can_fuse(
    x_seq: Tensor, norm: BatchNorm | None, node: DLIFNode, average_pool: bool = False
) -> bool:
    return can_fuse(x_seq, norm, node._surrogate(), average_pool, node.backend)


def _run_pooled(node: DLIFNode, x_seq: Tensor) -> Tensor:
    """The neuron called as a module, with the pooling in its operator."""

    def operator(
        currents: Tensor, *arguments: Any, threads_per_block: Any = None, **constants: Any
    ) -> Any:
        return batch_norm_dlif_multi_step(
            currents, None, *arguments, average_pool=True, **constants
        )

    node._operator = operator
    try:
        output: Tensor = node(x_seq)
    finally:
        node._operator = dlif_multi_step  # set, not deleted, which torch.compile cannot do
    return output


def _run(node: DLIFNode, x_seq: Tensor, values: BatchNorm, pooled: bool) -> Tensor:
    """The neuron's own forward, with its neighbours in its operator; what stands in for it gets its
    currents.

    So do hooks, with which the neuron is called as a module that finds its outputs made already.
    """
    done = False
    watched = _is_watched(node)
    currents = x_seq

    def operator(
        _: Tensor, *arguments: Any, threads_per_block: Any = None, **constants: Any
    ) -> Any:
        nonlocal done, currents  # the block size of a CUDA kernel means nothing here
        outputs: Any = batch_norm_dlif_multi_step(
            x_seq, values, *arguments, average_pool=pooled, store_current=watched, **constants
        )
        if watched:
            *outputs, currents = outputs
        done = True
        return outputs

    if _is_replaced(node):
        unchanged = (
            replace(values, running_mean=None, running_var=None)
            if values.use_batch_statistics
            else values
        )
        currents = apart.normalise(x_seq, unchanged)
    node._operator = operator
    try:
        if watched:
            spikes, v, _, v_seq = node._run(x_seq, node.v, node.time_step, node.store_v_seq)
            node._operator = lambda *_, **constants: (spikes, v, v_seq)
        spike_seq: Tensor = node(currents) if watched else node.multi_step_forward(currents)
    finally:
        node._operator = dlif_multi_step
    if not done:
        normalise(x_seq.detach(), values)  # the running statistics move all the same
    return spike_seq


def _values(norm: Any) -> BatchNorm:
    """The batch norm of this call, by the rules of torch's own forward; momentum None is a plain
    average.
    """
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


# torch has no public way to ask for a module's hooks; these are the names in every release since
# 2.0.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_watched(module: nn.Module) -> bool:
    """Whether anything but the module itself would have to run when it is called."""
    hooks = (hook for name in _HOOKS for hook in getattr(module, name).values())
    return "forward" in module.__dict__ or any(map(_is_active, hooks))


def _needs_more_than_input(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a hook of these kinds is not content with the module's input once that has run."""
    hooks = (hook for name in names for hook in getattr(module, name).values())
    return any(
        _is_active(hook) and getattr(getattr(hook, "__self__", None), "needs_output", True)
        for hook in hooks
    )


def _is_active(hook: Any) -> bool:
    return bool(getattr(getattr(hook, "__self__", None), "active", True))
