"""The maps between the spiking layers of a network, taken from one run in which every spiking layer
is cut.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.preserved import other_forward

__all__ = [
    "INPUT",
    "AffineMap",
    "CutRun",
    "call_key",
    "cut_run",
    "windows_per_input",
]

INPUT = "input"
"""Stands for the network's input where names of layers are listed."""

ADAPTIVE = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
POOLINGS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, *ADAPTIVE)


@dataclass
class CutRun:
    """What one run with cut layers saw.

    Attributes:
        currents: What reached each cut layer, in order of execution.
        leaves: What was put in the place of the input and of each cut layer's output.
        calls: How often each cut layer was called; the second call's current and leaf are ``"NAME
            (call 2)"``.
        windows: The most windows of a max pooling that one value lies in, of each one that was
            called.
        modules: Name of the innermost module by the graph node of its (first) output.
    """

    currents: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    windows: dict[str, int] = field(default_factory=dict)
    modules: dict[Any, str] = field(default_factory=dict)

    def between(self, name: str) -> tuple[list[str], set[str]]:
        """Modules, and names of the operations, that ran between the leaves and a layer's
        current.
        """
        seen = set()
        waiting = [self.currents[name].grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting.extend(parent for parent, _ in node.next_functions)
        modules = [module for node, module in self.modules.items() if node in seen]
        operations = {node.name() for node in seen}
        return modules, operations


def call_key(name: str, call: int) -> str:
    """What the current and the leaf of a layer's call, the first being 1, go by."""
    return name if call == 1 else f"{name} (call {call})"


def cut_run(
    net: nn.Module,
    frame: Tensor,
    cuts: Mapping[str, nn.Module],
    value: Callable[[str, Tensor], Tensor],
) -> CutRun:
    """Run a network whose input and cut layers' outputs are replaced by leaves, so that nothing
    passes a cut.

    Call it inside :func:`full_precision` and :func:`sj_robust.core.preserved.preserved`. Of
    ``frame`` only shape, dtype and device count. Layers in ``cuts`` are not run, except for max
    poolings, whose output's shape is needed; ``value`` gives the leaf for a name and a tensor of
    its shape.
    """
    run = CutRun()
    inside: set[nn.Module] = set()
    with ExitStack() as stack:
        for name, module in cuts.items():
            cut = _Cut(
                run=run,
                name=name,
                module=module,
                original=module.forward,
                value=value,
            )
            stack.enter_context(other_forward(module, cut))
            inside.update(module.modules())
        for name, module in net.named_modules():
            if name and module not in inside:
                hook = module.register_forward_hook(partial(_note_output, run, name))
                stack.callback(hook.remove)
        with torch.enable_grad():
            net(_leaf(run, INPUT, value(INPUT, frame)))
    return run


@dataclass(frozen=True)
class _Cut:
    """Forward of a cut layer: its current is noted, and a leaf comes out."""

    run: CutRun
    name: str
    module: nn.Module
    original: Callable[..., Tensor]
    value: Callable[[str, Tensor], Tensor]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = self.run
        run.calls[self.name] += 1
        key = call_key(self.name, run.calls[self.name])
        run.currents[key] = x.clone()
        like = x
        if isinstance(self.module, POOLINGS):
            with torch.no_grad():
                like = self.original(x, *args, **kwargs)
            run.windows[key] = windows_per_input(self.module, x, like)
        return _leaf(run, key, self.value(key, like))


def _leaf(run: CutRun, key: str, value: Tensor) -> Tensor:
    run.leaves[key] = value.requires_grad_()
    return value.clone()  # the network may work in place


def _note_output(run: CutRun, name: str, module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a module that is not cut."""
    if isinstance(output, tuple) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.grad_fn is not None:
        # What passes its input on is no operation.
        run.modules.setdefault(output.grad_fn, name)


class AffineMap:
    """The linear part of what leads from leaves to one current, with its adjoint.

    Equation: ``apply(v) = W v`` and ``adjoint(u) = W^T u``; both from the graph of the run: the
    adjoint is its vector-Jacobian product, and the map the vector-Jacobian product of that. Leaves
    that the current does not depend on are left out.
    """

    def __init__(self, current: Tensor, leaves: Mapping[str, Tensor]) -> None:
        """Build the graph of the adjoint; see the class."""
        self.current = current
        self._cotangent = torch.zeros_like(current, requires_grad=True)
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if current.requires_grad:
            with torch.enable_grad():
                gradients = torch.autograd.grad(
                    current,
                    list(leaves.values()),
                    self._cotangent,
                    create_graph=True,
                    allow_unused=True,
                )
        pairs = zip(leaves, gradients, strict=True)
        used = {name: gradient for name, gradient in pairs if gradient is not None}
        self.feeds = tuple(used)
        self.leaves = [leaves[name] for name in used]
        self._gradients = list(used.values())

    def apply(self, vectors: Sequence[Tensor]) -> Tensor:
        """``W v`` for one tensor per feeding leaf."""
        if not self.feeds:
            return torch.zeros_like(self.current)
        return torch.autograd.grad(self._gradients, self._cotangent, vectors, retain_graph=True)[0]

    def adjoint(self, cotangent: Tensor) -> tuple[Tensor, ...]:
        """``W^T u``, one tensor per feeding leaf."""
        return torch.autograd.grad(self.current, self.leaves, cotangent, retain_graph=True)


def windows_per_input(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """The most windows of a max pooling from x to y that one value lies in; its Lipschitz constant
    is the root.
    """
    most = 1
    is_kind = [isinstance(module, kind) for kind in POOLINGS]
    dimensions = 1 + is_kind.index(True) % 3
    for i in range(dimensions):
        windows: Counter[int] = Counter()
        if isinstance(module, ADAPTIVE):
            length = x.shape[i - dimensions]
            out = y.shape[i - dimensions]
            for j in range(out):
                end = -(-(j + 1) * length // out)
                windows.update(range(j * length // out, end))
        else:
            size = _of_dimension(module.kernel_size, i)
            stride = _of_dimension(module.stride, i)
            dilation = _of_dimension(module.dilation, i)
            windows.update(tap * dilation % stride for tap in range(size))
        most *= max(windows.values())
    return most


def _of_dimension(value: Any, i: int) -> int:
    return int(value[i] if isinstance(value, tuple) else value)
