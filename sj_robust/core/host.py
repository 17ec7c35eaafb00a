"""Bridge to SpikingJelly 0.0.0.0.14 and 2.x: the only file that checks which one is installed."""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.overrides
from torch import nn
from torch.utils import _python_dispatch

with warnings.catch_warnings():  # 0.0.0.0.14 uses torch.jit.script, of which torch 2.15 warns
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    from spikingjelly.activation_based import base, functional, layer, neuron, quantize, surrogate

# 2.x describes every stateful module by explicit states; 0.0.0.0.14 does not know the word.
_HAS_EXPLICIT_STATES = hasattr(base.MemoryModule, "functional_forward")

EVAL_MODE_HAS_NO_GRADIENT = not _HAS_EXPLICIT_STATES
"""Whether IF and LIF neurons of the installed release are not differentiable in evaluation mode."""

lif_multi_step: Callable[..., Any] | None = getattr(functional, "lif_multi_step", None)
"""SpikingJelly 2.x's fused LIF operator (native CUDA, Triton or torch); None on 0.0.0.0.14, which
has none.
"""

_TRITON_LOGGER = "torch._library.triton"
_TRITON_MESSAGE = "Triton not available, find_triton_kernels = []"

__all__ = [
    "EVAL_MODE_HAS_NO_GRADIENT",
    "base",
    "check_hooks_run",
    "first_argument",
    "functional",
    "invalidate_reset_cache",
    "is_counted",
    "is_neuron",
    "layer",
    "lif_multi_step",
    "memories",
    "neuron",
    "potential_at_reset",
    "quantize",
    "quiet_triton",
    "run_past_hooks",
    "runs_on_torch",
    "start_from",
    "step_mode",
    "surrogate",
    "within_backward",
]


def invalidate_reset_cache(net: nn.Module) -> None:
    """Make ``functional.reset_net`` look for the stateful modules of ``net`` and its parts
    again.
    """
    if hasattr(functional, "invalidate_reset_cache"):
        for module in net.modules():
            functional.invalidate_reset_cache(module)


def potential_at_reset(neuron: Any) -> Any:
    """The potential of a neuron before its first step. 首个时间步之前的膜电位。"""
    return neuron._memories_rv["v"]


def start_from(neuron: Any, v: Any) -> None:
    """Have a neuron begin from the potential ``v``, now and after every reset."""
    neuron.set_reset_value("v", v)
    neuron.v = v


def within_backward() -> bool:
    """Whether a backward pass runs in this thread, as where activation checkpointing calls a module
    once more. 是否处于反向传播中。
    """
    return torch._C._current_graph_task_id() != -1  # torch has no public way to ask


def is_counted() -> bool:
    """Whether a counter of SpikingJelly 2.x's ``op_counter`` watches what torch runs, operator by
    operator.

    It knows torch's operators and SpikingJelly's, so a kernel of ours would count as nothing.
    """
    if torch.compiler.is_compiling():
        return False
    if not (torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()):
        return False
    # torch has no public way to ask for the modes in force; these two are there in every release
    # since 2.0.
    modes = (
        *_python_dispatch._get_current_dispatch_mode_stack(),
        # untyped in torch
        *torch.overrides._get_current_function_mode_stack(),  # type: ignore[no-untyped-call]
    )
    counters = f"{base.__package__}.op_counter"
    for mode in modes:
        if any(cls.__module__.startswith(counters) for cls in type(mode).__mro__):
            return True
    return False


def is_neuron(module: nn.Module) -> bool:
    """Whether a module's class is, or derives from, one of SpikingJelly's neurons.
    是否为 SpikingJelly
    神经元。

    Examples:
        >>> is_neuron(neuron.LIFNode()), is_neuron(nn.ReLU())
        (True, False)
    """
    inside = f"{neuron.__name__}."
    return any(f"{cls.__module__}.".startswith(inside) for cls in type(module).__mro__)


def step_mode(module: nn.Module, otherwise: str = "m") -> str:
    """Step mode of a module of SpikingJelly; of another one the given one."""
    if isinstance(module, base.MultiStepModule):  # such as PSN, which has no attribute of it
        return "m"
    return str(module.step_mode) if isinstance(module, base.StepModule) else otherwise


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call, by its place or by keyword; None if there is none.
    调用的第一个参数。
    """
    return next(iter((*args, *kwargs.values())), None)


def memories(module: nn.Module) -> dict[str, Any]:
    """What a module of SpikingJelly carries from one time step to the next, by name."""
    if not isinstance(module, base.MemoryModule):
        return {}
    found: dict[str, Any] = module._memories  # every release has it; neither has a public name
    return found


def run_past_hooks(network: nn.Module, *, copied: bool = False) -> list[str]:
    """Names of parts with neurons that SpikingJelly 2.x's ``memopt`` runs past their hooks and
    forwards; if the network is to be ``copied``, also of parts without, which a copy would share.
    """
    found = []
    for name, module in network.named_modules():
        if _is_of_memopt(module):
            stateful = any(isinstance(part, base.MemoryModule) for part in module.modules())
            if stateful or copied:
                found.append(name)
    return found


def check_hooks_run(network: nn.Module, purpose: str, *, copied: bool = False) -> None:
    """Raise ValueError if there is a part of :func:`run_past_hooks`."""
    names = run_past_hooks(network, copied=copied)
    if names:
        raise ValueError(
            f"{purpose} needs the network without SpikingJelly's memopt, which runs "
            f"{names[0] or 'it'!r} past its hooks and forward; build the network without "
            "checkpoint_module and load the state_dict of this one, whose keys are the same"
        )


def _is_of_memopt(module: nn.Module) -> bool:
    function = vars(module).get("checkpoint_fn")  # of the wrapper that checkpoint_module returns
    if not isinstance(function, partial):
        return False
    return str(function.func.__module__).startswith(f"{base.__package__}.memopt")


def runs_on_torch(module: nn.Module) -> bool:
    """Whether no kernel of CuPy was chosen for a module, as 0.0.0.0.14's neurons let one do."""
    if _HAS_EXPLICIT_STATES or not isinstance(module, base.MemoryModule):
        return True
    return bool(module.backend == "torch")


def quiet_triton() -> None:
    """Drop one message of torch, and no other; for a process of ours, never on import.

    The first LIF layer of SpikingJelly 2.x that runs registers its kernels as Triton operators, and
    where Triton is not installed, as on any machine without a GPU, torch warns once per operator
    that it found none. Nothing is lost: the operators without Triton are used, and what needs
    Triton fails with an error of its own.
    """
    logging.getLogger(_TRITON_LOGGER).addFilter(_is_not_about_triton)


def _is_not_about_triton(record: logging.LogRecord) -> bool:
    return record.msg != _TRITON_MESSAGE
