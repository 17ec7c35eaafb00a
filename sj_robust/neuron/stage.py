"""Batch norm, a spiking neuron and average pooling as one module."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, has_torch_function
from torch.utils._device import DeviceContext

from sj_robust.core.host import is_counted, layer
from sj_robust.neuron.dlif import DLIFNode
from sj_robust.neuron.watching import NeuronHook, Wants, Watched, watched_of
from sj_robust.ops.bn_dlif import dispatch
from sj_robust.ops.bn_dlif.config import BatchNorm
from sj_robust.ops.dlif.config import DLIFConfig, Outputs, check_arguments

__all__ = ["NORM_DIMENSIONS", "Stage", "is_original", "pools_2x2"]


class Stage(nn.Module):
    """Batch norm, a spiking neuron and average pooling in sequence.
    批归一化、脉冲神经元与平均池化组成的一级。

    It has the same parameters, results and errors as an ``nn.Sequential`` of the three. They run in
    one pass if they can: a DLIFNode with SpikingJelly's batch norm, an average over 2x2 neurons, or
    both, in step mode ``"m"``, on the CPU with the compiled kernel. They run one after the other,
    exactly as in ``nn.Sequential``, on other devices and

    - if a child is hooked, replaced or an instance of a subclass, or a method is set on it,
    - if torch has hooks on all modules
      (``torch.nn.modules.module.register_module_forward_hook``),
    - under a ``TorchFunctionMode``, and for tensors of a class with a ``__torch_function__``.

    Monitors and gradient estimators of this package do not need to split the pass if they only use
    the neuron's input. SpikingJelly 2.x's counters (``op_counter``) see every child. Patches of a
    whole class or of torch's functions, such as ``torch.nn.functional.batch_norm``, go unnoticed;
    a ``TorchDispatchMode`` sees one operator instead of three, and so does a ``TorchFunctionMode``
    in compiled code. In bfloat16 and float16, one pass does not round the values between the
    children.

    Equation: ``pool(node(norm(x_seq)))``; a missing norm or pooling is left out.

    Shapes: ``x_seq`` [T, N, C, *] in step mode ``"m"``, [N, C, *] in ``"s"``.

    Args:
        node: The spiking neuron, of any kind.
        norm: The batch norm before it.
        pool: The pooling after it.
        one_pass: Whether the children may run in one pass.

    Source: batch norm folded into its neighbour, as in every inference engine; here also in
        training.

    Examples:
        >>> stage = Stage(DLIFNode(T=4), norm=layer.BatchNorm2d(3, step_mode="m"))
        >>> stage(torch.randn(4, 2, 3, 5, 5)).shape
        torch.Size([4, 2, 3, 5, 5])
        >>> list(stage.state_dict())[:2], list(stage.state_dict())[-1]
        (['norm.weight', 'norm.bias'], 'node.input_gain')
    """

    norm: Any
    node: Any
    pool: Any

    def __init__(
        self,
        node: nn.Module,
        *,
        norm: nn.Module | None = None,
        pool: nn.Module | None = None,
        one_pass: bool = True,
    ) -> None:
        """Keep the children; see the class."""
        super().__init__()
        self.register_module("norm", norm)
        self.register_module("node", node)
        self.register_module("pool", pool)
        self.one_pass = one_pass

    def extra_repr(self) -> str:
        """What ``print`` shows in addition to the children."""
        return "" if self.one_pass else "one_pass=False"

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The existing children by name, in the order in which they run."""
        for name in ("norm", "node", "pool"):
            child = getattr(self, name)
            if child is not None:
                yield name, child

    def forward(self, x_seq: Tensor) -> Tensor:
        """Run the children, in one pass if they can."""
        if self._is_as_made() and self._takes(x_seq):
            norm = None if self.norm is None else _values(self.norm)
            watched = watched_of(self.node)
            wants = max([one.wants() for one in watched], default=Wants.NOTHING)
            if self._gives(x_seq, norm, wants):
                return self._run_as_one(x_seq, norm, watched, wants)
        for _, child in self.parts():
            x_seq = child(x_seq)
        return x_seq

    def _is_as_made(self) -> bool:
        """The one rule: nothing but the children's own code would have to run."""
        if not self.one_pass or _has_global_hooks() or is_counted():
            return False
        for child in self._modules.values():
            if child is not None and not is_original(child):
                return False
        return True

    def _takes(self, x_seq: Any) -> bool:
        """Whether the children and their input are what one pass is for."""
        node, norm, pool = self.node, self.norm, self.pool
        if type(node) is not DLIFNode or node.step_mode != "m" or not isinstance(x_seq, Tensor):
            return False
        if norm is None and pool is None:
            return False
        if pool is not None and not (pools_2x2(pool) and pool.step_mode == "m"):
            return False
        if norm is None:
            return True
        if norm.step_mode != "m" or x_seq.ndim != NORM_DIMENSIONS.get(type(norm)):
            return False
        if (norm.running_mean is None) != (norm.running_var is None):
            return False  # which torch refuses in its own words
        return bool(x_seq.shape[2] == norm.num_features)

    def _gives(self, x_seq: Tensor, norm: BatchNorm | None, wants: Wants) -> bool:
        """Whether one pass gives what is wanted of this call, and has a kernel."""
        if wants is Wants.SPIKES or (wants is Wants.INPUT and self.node.gradient is not None):
            return False
        tensors: list[Tensor | None] = [x_seq]
        if norm is not None:
            if norm.use_batch_statistics and x_seq.numel() == x_seq.shape[2]:
                return False  # a single value per channel, which torch refuses in its own words
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        if _is_overridden(tensors):
            return False
        surrogate = self.node._surrogate()
        has_pool = self.pool is not None
        return dispatch.runs_in_one_pass(x_seq, norm, surrogate, has_pool, self.node.backend)

    def _run_as_one(
        self,
        x_seq: Tensor,
        norm: BatchNorm | None,
        watched: list[Watched],
        wants: Wants,
    ) -> Tensor:
        node = self.node
        told = [one for one in watched if not one.is_idle()]
        for one in told:
            one.enter(node, copies=False)
        operator = _OnePass(
            norm,
            average_pool=self.pool is not None,
            store_current=wants is Wants.INPUT,
        )
        if node.gradient is None or not torch.is_grad_enabled():
            output: Tensor = node._advance(x_seq, operator)
        else:
            output = self._run_with_gradient(x_seq, norm)
        if norm is not None:
            _count_batch(self.norm)
        for one in told:
            one.leave(node, x_seq if norm is None else operator.current, None)
        return output

    def _run_with_gradient(self, x_seq: Tensor, norm: BatchNorm | None) -> Tensor:
        """Forward in one pass except for the pooling, backward by the neuron's ``gradient`` from
        its currents.
        """
        currents = x_seq
        if norm is not None:
            unmoved = norm
            if norm.use_batch_statistics:
                unmoved = replace(norm, running_mean=None, running_var=None)
            currents = dispatch.normalise(x_seq, unmoved)
        operator = _OnePass(norm, average_pool=False, store_current=False)
        forward = partial(self.node._advance, x_seq, operator)
        spike_seq: Tensor = self.node.gradient.multi_step(currents, forward)
        if self.pool is None:
            return spike_seq
        if dispatch.can_pool(spike_seq):
            return dispatch.pool(spike_seq)
        return self.pool(spike_seq)  # type: ignore[no-any-return]  # torch types a call as Any


@dataclass
class _OnePass:
    """Batch norm and pooling of one call around the operator of the neuron; keeps its currents if
    told to.
    """

    norm: BatchNorm | None
    average_pool: bool
    store_current: bool
    current: Tensor | None = None

    def __call__(
        self,
        x_seq: Tensor,
        gain: Tensor,
        v_init: Tensor | None,
        *,
        store_v_seq: bool,
        backend: str,
        **constants: Any,
    ) -> Outputs:
        check_arguments(x_seq, gain, v_init)
        outputs = dispatch.in_one_pass(
            x_seq,
            self.norm,
            gain,
            v_init,
            config=DLIFConfig(**constants),
            average_pool=self.average_pool,
            store_v_seq=store_v_seq,
            store_current=self.store_current,
        )
        self.current = outputs.current
        return Outputs(outputs.spike_seq, outputs.v, outputs.v_seq)


NORM_DIMENSIONS: dict[type, int] = {
    layer.BatchNorm1d: 4,
    layer.BatchNorm2d: 5,
    layer.BatchNorm3d: 6,
}
"""Batch norms that run in one pass, with the number of dimensions of [T, N, C, *]."""


def pools_2x2(module: nn.Module | None) -> bool:
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
    mean, variance = norm.running_mean, norm.running_var
    return BatchNorm(
        weight=norm.weight,
        bias=norm.bias,
        running_mean=mean if uses_buffers else None,
        running_var=variance if uses_buffers else None,
        use_batch_statistics=norm.training or (mean is None and variance is None),
        momentum=momentum,
        eps=norm.eps,
    )


def _count_batch(norm: Any) -> None:
    """As torch's own forward counts, which also tracks without a counter."""
    tracks = norm.training and norm.track_running_stats
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


# torch has no public way to ask for hooks; these are the names in every release since 2.0.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _methods(kind: type) -> frozenset[str]:
    """Names that must not be set on a child; those that Python asks the class for may be."""
    names = [name for name in dir(kind) if not name.startswith("__")]
    methods = [name for name in names if callable(getattr(kind, name))]
    return frozenset(methods) | {"_compiled_call_impl"}


_METHODS = {kind: _methods(kind) for kind in (DLIFNode, *NORM_DIMENSIONS, layer.AvgPool2d)}


def is_original(module: nn.Module) -> bool:
    """Whether a call of a module runs the code of its class, and nothing else.

    Hooks by which this package itself watches a neuron do not count: a stage tells them.
    """
    methods = _METHODS.get(type(module))
    if methods is None or _sets_one_of(module, methods):
        return False
    for name in _HOOKS:
        hooks = getattr(module, name)
        if not hooks:
            continue
        for hook in hooks.values():
            if not (isinstance(hook, NeuronHook) and type(module) is DLIFNode):
                return False
    return True


def _sets_one_of(module: nn.Module, methods: frozenset[str]) -> bool:
    """Whether a module has an attribute of its own instead of one of these methods."""
    if torch.compiler.is_compiling():  # torch 2.8 cannot guard the elements of a set
        return any(name in module.__dict__ for name in sorted(methods))
    return not methods.isdisjoint(module.__dict__)


def _is_overridden(tensors: list[Tensor | None]) -> bool:
    """Whether somebody is told of every function of torch that is called with one of them."""
    if not has_torch_function(tensors) or torch.compiler.is_compiling():
        return False
    # untyped in torch
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if not modes or any(type(mode) is not DeviceContext for mode in modes):
        return True
    # the mode of torch.set_default_device changes none of the functions that run here
    return any(type(tensor) not in (Tensor, nn.Parameter, type(None)) for tensor in tensors)


def _has_global_hooks() -> bool:
    """Whether torch has hooks on every module."""
    every = nn.modules.module
    return bool(
        every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )
