"""A trained network at another number of time steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.checks import check_count
from sj_robust.core.host import functional, invalidate_reset_cache, layer, neuron

__all__ = ["keep_time_steps", "set_time_steps"]

_SCALED_BY_STEP: tuple[type[nn.Module], ...] = tuple(
    getattr(layer, f"TemporalEffectiveBatchNorm{dims}d")
    for dims in (1, 2, 3)
    if hasattr(layer, f"TemporalEffectiveBatchNorm{dims}d")
)
"""Batch norms of SpikingJelly 2.x with a scale per time step; 0.0.0.0.14 has none."""


def set_time_steps(net: nn.Module, T: int) -> dict[str, tuple[int, int]]:
    """Let a trained network run for a different number of time steps.
    让已训练的网络以不同的时间步数运行。

    Equation, for the gains of a DLIF neuron trained at T0 steps::

        input_gain[t] = trained[min(t, T0 - 1)]     for t = 0 .. T - 1

    A shorter sequence keeps the first gains, since the gain of a step was learned for the potential
    after the steps before it, and these are the same. A longer one repeats the last gain, which was
    learned for a membrane that has been charged for a while; a mean over all gains would include
    the first ones, learned for an empty membrane, and fit no step.

    The leaks of FEEL-SNN, the signatures of HoSNN and the scales of SpikingJelly's
    ``TemporalEffectiveBatchNorm``, which have one value per step too, follow the same rule. All
    other modules that keep the number of steps in an attribute ``T`` (the classifier, the networks
    of this package) get the new number; an attribute of this name that is another number than that
    of the classifier and of these neurons means something else, and stays. A network without either
    has every ``T`` changed. States are reset. An existing optimizer still holds the old gains:
    create a new one.

    Args:
        net: A ``SpikingClassifier``, a network or any module, changed in place.
        T: Number of time steps, >= 1.

    Returns:
        The (old, new) number of steps of every changed module, by its name.

    Raises:
        ValueError: If T is out of range, the network repeats its images itself and keeps the number
            of steps in no attribute ``T``, or neurons such as PSN have weights for their T steps.

    Source: the gains of Ding et al. (ICML 2024), section 4; the rule is this package's.

    Examples:
        >>> from sj_robust.neuron import DLIFNode
        >>> net = nn.Sequential(DLIFNode(T=2))
        >>> _ = net[0].input_gain.data.copy_(torch.tensor([1.0, 0.5]))
        >>> set_time_steps(net, 4)
        {'0': (2, 4)}
        >>> net[0].input_gain.tolist()
        [1.0, 0.5, 0.5, 0.5]
    """
    check_count("T", T)
    return _changed(net, T, lambda steps: [min(t, steps - 1) for t in range(T)])


def keep_time_steps(net: nn.Module, kept: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Let a trained network run for some of its time steps only, each with its own gain.
    让已训练的网络只运行其中若干时间步。

    Args:
        net: As in :func:`set_time_steps`, changed in place.
        kept: Numbers of the steps that are kept, from 0.

    Returns:
        The (old, new) number of steps of every changed module, by its name.

    Raises:
        ValueError: As in :func:`set_time_steps`, or if the steps are none, not in order, or not
            among those of a neuron.

    Examples:
        >>> from sj_robust.neuron import DLIFNode
        >>> net = nn.Sequential(DLIFNode(T=3))
        >>> _ = net[0].input_gain.data.copy_(torch.tensor([1.0, 0.5, 0.25]))
        >>> keep_time_steps(net, [0, 2])
        {'0': (3, 2)}
        >>> net[0].input_gain.tolist()
        [1.0, 0.25]
    """
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0:
        raise ValueError(f"kept must be steps from 0 in order, at least one, got {list(kept)}")
    return _changed(net, len(kept), lambda steps: kept)


@dataclass(frozen=True)
class _Change:
    """A module that gets another number of steps.

    Attributes:
        name: Its name.
        module: The module.
        steps: Its number of steps so far.
        origin: The old step of every new one.
    """

    name: str
    module: Any
    steps: int
    origin: Sequence[int]

    def check(self) -> None:
        """Raise ValueError if the module cannot be changed."""
        _check_weights(self.name, self.module, self.steps)
        last = max(self.origin)
        if _per_step(self.module) and last >= self.steps:
            raise ValueError(f"{self.name} has {self.steps} time steps, got step {last}")

    def make(self) -> None:
        """Change the module."""
        for held in _per_step(self.module):
            _take_rows(self.module, held, self.origin)
        if "T" in vars(self.module):
            self.module.T = len(self.origin)


@torch.no_grad()
def _changed(
    net: nn.Module, T: int, origin: Callable[[int], Sequence[int]]
) -> dict[str, tuple[int, int]]:
    """Change the number of steps; ``origin`` gives the old step of every new one."""
    numbers = _numbers_of_steps(net)
    _check_brought_steps(net, T, numbers)
    changes = []
    for name, module in net.named_modules():
        steps = _steps_of(module)
        if steps is None or list(origin(steps)) == list(range(steps)):
            continue
        is_number_of_steps = steps in numbers or not numbers
        if _per_step(module) or ("T" in vars(module) and is_number_of_steps):
            changes.append(_Change(name, module, steps, origin(steps)))
    for change in changes:
        change.check()
    for change in changes:
        change.make()
    for module in net.modules():
        if isinstance(module, SpikingClassifier):
            module.forget_convention()
    invalidate_reset_cache(net)
    functional.reset_net(net)
    return {change.name: (change.steps, T) for change in changes}


def _steps_of(module: nn.Module) -> int | None:
    """Number of scales or the attribute ``T`` of a module, if it is a number; a classifier may not
    know its own yet.
    """
    if isinstance(module, _SCALED_BY_STEP):
        scale: Any = module.scale
        return len(scale)
    steps = getattr(module, "T", None)
    return steps if isinstance(steps, int) and not isinstance(steps, bool) else None


def _per_step(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters and buffers of a module that have a row per time step."""
    if isinstance(module, _SCALED_BY_STEP):
        return ("scale",)
    names = getattr(type(module), "per_step", ())
    return names if isinstance(names, tuple) else ()


def _take_rows(module: nn.Module, name: str, rows: Sequence[int]) -> None:
    """Give a parameter or buffer these of its rows, if it has any yet."""
    held = getattr(module, name)
    if held is None or is_lazy(held):
        return
    taken = held.detach()[torch.tensor(rows, device=held.device)]
    if isinstance(held, nn.Parameter):
        taken = nn.Parameter(taken, requires_grad=held.requires_grad)
    setattr(module, name, taken)


def _check_brought_steps(net: nn.Module, T: int, numbers: set[int]) -> None:
    """Raise if a network brings its steps and would not be changed."""
    for classifier in net.modules():
        if not isinstance(classifier, SpikingClassifier) or vars(classifier).get("T") == T:
            continue
        found = classifier.convention
        takes_images = found is not None and found.takes == "images"
        brings_them = takes_images or "T" not in vars(classifier)
        if brings_them and not _keeps_steps(classifier.net, T, numbers):
            raise ValueError(
                f"the network ({type(classifier.net).__name__}) brings its own time steps, and "
                f"keeps their number in no attribute T; build it for T={T}, and wrap it anew"
            )


def _keeps_steps(net: nn.Module, T: int, numbers: set[int]) -> bool:
    """Whether a module has the new number or one of the known ones as its ``T``; any number, if
    none is known.
    """
    kept = {_steps_of(module) for module in net.modules()} - {None}
    if not numbers:
        return bool(kept)
    return bool(kept & {T, *numbers})


def _check_weights(name: str, module: nn.Module, steps: int) -> None:
    """Raise if it is a neuron of SpikingJelly with weights for its steps, such as PSN."""
    if not type(module).__module__.startswith(neuron.__name__):
        return
    tensors: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(tensor.ndim and len(tensor) == steps for tensor in tensors if not is_lazy(tensor)):
        raise ValueError(
            f"{name} ({type(module).__name__}) has weights for its {steps} time steps, which "
            "cannot be changed; train it with the other number"
        )


def _numbers_of_steps(net: nn.Module) -> set[int]:
    """Those of modules whose ``T`` is known to mean them."""
    found = set()
    for module in net.modules():
        steps = _steps_of(module)
        if steps is not None and (_per_step(module) or isinstance(module, SpikingClassifier)):
            found.add(steps)
    return found
