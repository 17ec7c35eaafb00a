"""CBA: the gradient of a copy with ReLU instead of every spiking neuron."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.host import base, memories, step_mode
from sj_robust.core.preserved import RandomNumbers

__all__ = ["crafting_network"]


class _Rectifier(nn.Module, base.StepModule):
    """ReLU instead of a neuron, with its step mode."""

    def __init__(self, step_mode: str) -> None:
        super().__init__()
        self.step_mode = step_mode

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class _CraftingNetwork(nn.Module):
    """The network, with the gradient of its copy.

    Both are registered, so that modes and resets reach them.
    """

    def __init__(self, network: nn.Module, rectified: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        numbers = RandomNumbers(self.network, x.device)
        with torch.no_grad():
            values: Tensor = self.network(x)
        if not torch.is_grad_enabled():
            return values
        with numbers.again():
            rectified: Tensor = self.rectified(x)
        if rectified.shape != values.shape:
            raise ValueError(
                "cba needs neurons whose output has the shape of their input, got outputs "
                f"{list(rectified.shape)} of the network with ReLU and {list(values.shape)} of the "
                "network; use another estimator"
            )
        return values + torch.where(rectified.isfinite(), rectified - rectified.detach(), 0.0)


def crafting_network(model: nn.Module, neurons: Iterable[Any]) -> nn.Module:
    """A network with the values of ``model`` and the gradient of a copy of it that has ReLU instead
    of its neurons, for the same random numbers; weights get no gradient.

    Equation: ``f(x) + r(x) - stop_gradient(r(x))``, r being f with ``s[t] = max(0, x[t])``.

    Source: conversion-based approximation, Sharmin et al. (ECCV 2020), as named by Bu et al. (CVPR
        2023), whose attack sees the logits of r as well.
    """
    return _CraftingNetwork(model, _rectified(model, neurons))


def _rectified(model: nn.Module, neurons: Iterable[Any]) -> nn.Module:
    """The copy; its weights share their memory but need no gradient."""
    # deepcopy takes what stands in its memo in the place of a copy
    memo: dict[int, Any] = {}
    for node in neurons:
        rectifier = _Rectifier(step_mode(node))
        memo[id(node)] = rectifier.train(node.training)
    for parameter in model.parameters():
        shared = parameter.detach()
        memo[id(parameter)] = nn.Parameter(shared, requires_grad=False)
    for module in model.modules():
        for value in (*vars(module).values(), *memories(module).values()):
            if isinstance(value, torch.Generator):
                memo[id(value)] = value
            elif isinstance(value, Tensor) and value.grad_fn is not None:
                # deepcopy refuses a tensor with a graph, such as the state of a neuron
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
