"""A network that is attacked or measured stays as it was: modes, states of its neurons, generators;
exact sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["all_generators", "evaluation_mode", "full_precision", "generators_of", "preserved"]


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
        _highest_matmul_precision(),
    ):
        yield


@contextmanager
def sums_of_products(device: torch.device) -> Iterator[None]:
    """:func:`full_precision`, and convolutions that are sums of products. 卷积只做乘积求和。

    The error of a float32 sum of n products is at most gamma_n in any order, which proofs count
    with. Winograd's and the FFT algorithm are no such sums. cuDNN may take either whatever its
    flags ``deterministic`` and ``benchmark`` say (its Winograd is deterministic), so it is switched
    off: torch's own CUDA convolutions are direct or matrix products. NNPACK, which torch takes on a
    CPU without oneDNN, is Winograd's; oneDNN's convolutions are direct as torch calls them.
    """
    cudnn, nnpack = torch.backends.cudnn, torch.backends.nnpack
    with full_precision(device), cudnn.flags(enabled=False, allow_tf32=False), nnpack.flags(False):
        yield


@contextmanager
def _highest_matmul_precision() -> Iterator[None]:
    """Matrix products in float32: no TF32 on a GPU, no bfloat16 on a CPU."""
    cuda: Any = torch.backends.cuda.matmul
    if not hasattr(cuda, "fp32_precision"):  # before torch 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    mkldnn: Any = torch.backends.mkldnn
    owners = [cuda, mkldnn.matmul]
    before = [owner.fp32_precision for owner in owners]
    for owner in owners:
        owner.fp32_precision = "ieee"
    try:
        yield
    finally:
        for owner, precision in zip(owners, before, strict=True):
            owner.fp32_precision = precision


def all_generators(model: object, device: torch.device) -> list[torch.Generator]:
    """Torch's global generators of the CPU and of a device, and those of :func:`generators_of`."""
    found = [torch.default_generator, *generators_of(model)]
    if device.type == "cuda":
        found.append(torch.cuda.default_generators[device.index or 0])
    return found


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
