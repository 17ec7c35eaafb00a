"""A trained network at another number of time steps."""

import torch
from torch import nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.host import functional, invalidate_reset_cache
from sj_robust.neuron import DLIFNode

__all__ = ["set_time_steps"]


@torch.no_grad()
def set_time_steps(net: nn.Module, T: int) -> dict[str, tuple[int, int]]:
    """Let a trained network run for a different number of time steps.
    让已训练的网络以不同的时间步数运行。

    Equation, for the gains of a DLIF neuron trained at T0 steps::

        input_gain[t] = trained[min(t, T0 - 1)]     for t = 0 .. T - 1

    A shorter sequence keeps the first gains, since the gain of a step was learned for the potential
    after the steps before it, and these are the same. A longer one repeats the last gain, which was
    learned for a membrane that has been charged for a while; a mean over all gains would include
    the first ones, learned for an empty membrane, and fit no step.

    All other modules that keep the number of steps in an attribute ``T`` (the classifier, the
    networks of this package) get the new number; an attribute of this name that is another number
    than that of the classifier and of the DLIF neurons means something else, and stays. A network
    without either has every ``T`` changed. States are reset. An existing optimizer still
    holds the old gains: create a new one.

    Args:
        net: A ``SpikingClassifier``, a network or any module, changed in place.
        T: Number of time steps, >= 1.

    Returns:
        The (old, new) number of steps of every changed module, by its name.

    Raises:
        ValueError: If T is out of range.

    Source: the gains of Ding et al. (ICML 2024), section 4; the rule is this package's.

    Examples:
        >>> net = nn.Sequential(DLIFNode(T=2))
        >>> _ = net[0].input_gain.data.copy_(torch.tensor([1.0, 0.5]))
        >>> set_time_steps(net, 4)
        {'0': (2, 4)}
        >>> net[0].input_gain.tolist()
        [1.0, 0.5, 0.5, 0.5]
    """
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"T must be an integer >= 1, got {T!r}")
    numbers = _numbers_of_steps(net)
    changed: dict[str, tuple[int, int]] = {}
    for name, module in net.named_modules():
        steps = getattr(module, "T", None)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps == T:
            continue
        if isinstance(module, DLIFNode):
            gain = module.input_gain
            index = torch.arange(T, device=gain.device).clamp(max=steps - 1)
            kept = gain.detach()[index]
            module.input_gain = nn.Parameter(kept, requires_grad=gain.requires_grad)
        elif "T" in vars(module) and (steps in numbers or not numbers):
            module.T = T
        else:
            continue
        changed[name] = (steps, T)
    invalidate_reset_cache(net)
    functional.reset_net(net)
    return changed


def _numbers_of_steps(net: nn.Module) -> set[int]:
    """Those of modules whose ``T`` is known to mean them."""
    found = set()
    for module in net.modules():
        steps = getattr(module, "T", None)  # that a classifier may not know yet
        if isinstance(module, DLIFNode | SpikingClassifier) and steps is not None:
            found.add(steps)
    return found
