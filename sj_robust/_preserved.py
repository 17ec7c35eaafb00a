"""A network that is attacked or measured stays as it was: modes, states of its neurons, generators;
exact sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["evaluation_mode", "full_precision", "generators_of", "preserved"]


@contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Evaluation mode, and every module's own mode afterwards; what is no ``nn.Module`` has none.
    评估模式。

    Examples:
        >>> net = nn.Sequential(nn.Dropout(), nn.Identity().eval())
        >>> with evaluation_mode(net):
        ...     [module.training for module in net]
        [False, False]
        >>> [module.training for module in net]
        [True, False]
    """
    modes = (
        [(module, module.training) for module in model.modules()]
        if isinstance(model, nn.Module)
        else []
    )
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def preserved(model: object) -> Iterator[None]:
    """Evaluation mode; modes, states of neurons and generators of modules are as before afterwards.
    保持网络原状。

    Inside, states are copies without a graph, since a reset may write into their tensors. A
    callable that is no network has nothing to be kept.

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> net = neuron.IFNode()
        >>> _ = net(torch.tensor([0.5]))
        >>> with preserved(net):
        ...     net.reset()
        >>> net.v
        tensor([0.5000])
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    states = [
        (module, vars(module)["_memories"]) for module in modules if "_memories" in vars(module)
    ]
    generators = [(generator, generator.get_state()) for generator in generators_of(model)]
    with evaluation_mode(model):
        try:
            for module, memories in states:
                vars(module)["_memories"] = {
                    name: _copied(value) for name, value in memories.items()
                }
            yield
        finally:
            for module, memories in states:
                vars(module)["_memories"] = memories
            for generator, state in generators:
                generator.set_state(state)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32, no inference mode, and a random state of its own. 全精度计算。"""
    cudnn = torch.backends.cudnn
    with (
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        cudnn.flags(enabled=cudnn.enabled, deterministic=cudnn.deterministic, allow_tf32=False),
    ):
        yield


def generators_of(model: object) -> list[torch.Generator]:
    """Generators that modules of a network keep as attributes, such as that of a Poisson encoder;
    each once.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = (
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, torch.Generator)
    )
    return list(dict.fromkeys(found))


def _copied(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value
