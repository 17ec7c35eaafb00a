"""CBA: the network with ReLU instead of every spiking neuron."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.host import base, memories, step_mode

__all__ = ["crafting_network"]


class _Rectifier(nn.Module, base.StepModule):
    """ReLU instead of a neuron, with its step mode."""

    def __init__(self, step_mode: str) -> None:
        super().__init__()
        self.step_mode = step_mode

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


def crafting_network(model: nn.Module, neurons: Iterable[Any]) -> nn.Module:
    """A copy of a network with ReLU instead of its neurons; weights share their memory but need no
    gradient.

    Equation: ``s[t] = max(0, x[t])``.

    Source: conversion-based approximation, Sharmin et al. (ECCV 2020), as named by Bu et al. (CVPR
        2023).
    """
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
