"""What a measurement must leave as it was."""

import copy
import random
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def unchanged(model, *generators, hooked=(), states=True):
    """Modes, weights, gradients, flags and hooks of a network, and all generators, are as before in
    the end.

    So are the states of its neurons, unless told otherwise; modules of ``hooked`` may have hooks,
    those of the test.
    """
    modules = [module for module in model.modules() if module not in hooked]
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    memories = []
    if states:
        memories = [vars(module).get("_memories", {}) for module in model.modules()]
    kept = []
    for own in memories:
        kept += [(own, name, value) for name, value in own.items() if torch.is_tensor(value)]
    values = [value.detach().clone() for _, _, value in kept]
    surrogates = [getattr(module, "surrogate_function", None) for module in model.modules()]
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    grads = [copy.deepcopy(parameter.grad) for parameter in parameters]
    of_numpy = repr(np.random.get_state())  # noqa: NPY002  the global one
    before = (
        torch.get_rng_state(),
        random.getstate(),
        *(generator.get_state() for generator in generators),
    )
    try:
        yield
    finally:
        assert [module.training for module in model.modules()] == modes
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name])
        if states:
            now = [vars(module).get("_memories", {}) for module in model.modules()]
            assert now == memories
        for own, name, value in kept:
            assert own[name] is value
        for (_, _, value), copied in zip(kept, values, strict=True):
            assert torch.equal(value, copied)
        found = [getattr(module, "surrogate_function", None) for module in model.modules()]
        assert found == surrogates
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        for g, state in zip(generators, before[2:], strict=True):
            assert torch.equal(g.get_state(), state)
        assert repr(np.random.get_state()) == of_numpy  # noqa: NPY002  as above
        assert [parameter.requires_grad for parameter in parameters] == flags
        for parameter, grad in zip(parameters, grads, strict=True):
            assert parameter.grad is grad is None or torch.equal(parameter.grad, grad)
        for module in modules:
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
