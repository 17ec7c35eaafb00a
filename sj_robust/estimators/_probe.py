"""Whether a neuron spikes through its surrogate, as a run of a copy shows."""

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sj_robust.core.host import EVAL_MODE_HAS_NO_GRADIENT, from_reset, step_mode
from sj_robust.core.preserved import preserved
from sj_robust.estimators.shapes import KeepingValues

__all__ = ["ignores_surrogate"]

_STEPS = 4
_ELEMENTS = 64


def ignores_surrogate(node: Any) -> bool:
    """Whether a neuron has the same gradient with its surrogate as with one of derivative 0, so
    that another surrogate changes nothing; False where a copy cannot show it.

    The neuron and the generators stay as they are.
    """
    try:
        with preserved(node):
            twin = copy.deepcopy(node)
        own = _gradient(twin)
        twin.surrogate_function = KeepingValues(twin.surrogate_function, torch.zeros_like)
        without = _gradient(twin)
    except Exception:  # foreign code raises anything, such as for an input of another shape
        return False
    return bool(own.any()) and torch.equal(own, without)


def _gradient(node: Any) -> Tensor:
    """Gradient of the number of spikes with respect to currents around the threshold."""
    tensors = chain(node.parameters(), node.buffers())
    like = next(filter(Tensor.is_floating_point, tensors), torch.empty(0))
    threshold = torch.as_tensor(getattr(node, "v_threshold", 1.0)).detach().mean().item()
    x = torch.linspace(-1.0, 4.0, _ELEMENTS, dtype=like.dtype, device=like.device)
    x = (x * threshold).repeat(_STEPS, 1, 1).requires_grad_()
    with from_reset(node, 0, x.device), torch.enable_grad():
        node.training = EVAL_MODE_HAS_NO_GRADIENT
        calls = [x] if step_mode(node) == "m" else x.unbind()
        spikes = [node.forward(part) for part in calls]  # past hooks, which may do anything
        (grad,) = torch.autograd.grad(torch.cat(spikes).sum(), x)
    return grad
