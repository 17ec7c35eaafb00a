"""Random calls of the DLIF operator, run by a backend and by hand."""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from ops import slopes
from oracle import dlif_bptt
from torch.utils._python_dispatch import TorchDispatchMode

from sj_robust.ops import Surrogate, dlif_multi_step
from sj_robust.ops.dlif import cpp
from sj_robust.ops.surrogate import HOST_NAMES

needs_kernel = pytest.mark.skipif(
    cpp.unavailable_reason() is not None, reason=str(cpp.unavailable_reason())
)
KERNELS = [f"cpp {name}" for name in cpp.instruction_sets()]
"""The compiled kernel with every instruction set of this processor."""
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
"""That two tensors, or sequences of tensors and None, are the same numbers in the same dtype."""


class Inputs(NamedTuple):
    """What the operator gets; also the gradients of it."""

    x: torch.Tensor
    gain: torch.Tensor
    v_init: torch.Tensor | None


class Outputs(NamedTuple):
    """What the operator gives; also the incoming gradients of it, None for what nobody uses."""

    spikes: torch.Tensor | None
    v: torch.Tensor | None
    potentials: torch.Tensor | None


class Call(NamedTuple):
    """What goes in, forward and backward."""

    inputs: Inputs
    grads: Outputs


class Results(NamedTuple):
    """What comes out, forward and backward."""

    outputs: Outputs
    gradients: Inputs


def random_call(shape, dtype=torch.float64, seed=0):
    """Inputs, and incoming gradients of the three outputs."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=state)

    x = (0.3 + 0.8 * normal(*shape)).to(dtype)
    grad_spikes = normal(*shape).to(dtype)
    gain = 1 + 0.3 * normal(shape[0])
    v_init = 0.2 + 0.4 * normal(*shape[1:])
    grads = Outputs(grad_spikes, normal(*shape[1:]), normal(*shape))
    return Call(Inputs(x, gain, v_init), grads)


def laid_out(x_seq, channels_last):
    """The same numbers with every step in this order in memory."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x_seq.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, x_seq.shape[:2])


def choose(monkeypatch, name):
    """The backend of a name, which may say an instruction set behind it."""
    backend, _, instruction_set = name.partition(" ")
    if instruction_set:
        monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, instruction_set)
    return backend


class Seen(TorchDispatchMode):
    """Names of the operators that run meanwhile."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def run(backend, inputs, grads, *, kind="triangle", alpha=1.0, store_v_seq=True, **constants):
    """Outputs, and the gradients of the inputs."""

    def each(function, tensors):
        return [None if tensor is None else function(tensor) for tensor in tensors]

    leaves = each(lambda tensor: tensor.clone().requires_grad_(), inputs)
    surrogate = Surrogate(kind, alpha)
    outputs = dlif_multi_step(
        *leaves, surrogate=surrogate, store_v_seq=store_v_seq, backend=backend, **constants
    )
    used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    found = each(torch.Tensor.detach, outputs)
    gradients = each(lambda leaf: leaf.grad, leaves)
    return Results(Outputs(*found), Inputs(*gradients))


def check_slopes(backend, dtype=torch.float32, device="cpu"):
    """Every surrogate, at ordinary potentials and at extreme ones."""
    for kind, alpha in itertools.product(HOST_NAMES, slopes.ALPHAS):
        z = slopes.points(alpha, np.float64 if dtype == torch.float64 else np.float32)
        x = torch.from_numpy(z)[None].to(device)
        inputs = (x, torch.ones(1, dtype=dtype, device=device), None)
        grads = (torch.ones_like(x), None, None)
        constants = {"decay": 0.5, "v_threshold": 0.0, "detach_reset": True}
        _, (found, *_) = run(backend, inputs, grads, kind=kind, alpha=alpha, **constants)
        slopes.check(kind, alpha, z, found[0].cpu().numpy())


def not_finite():
    """Currents that are not all finite, and gradients said outright, since plain torch leaves out a
    None.
    """
    x = torch.zeros(4, 70)
    x[1, 3] = float("nan")
    x[1, 5] = float("inf")
    x[1, 7] = -float("inf")
    x[1, 69] = float("nan")
    grads = torch.ones_like(x), torch.zeros(70), torch.zeros(4, 70)
    for kind, v_reset in itertools.product(("triangle", "atan", "sigmoid"), (0.0, None)):
        options = {"decay": 0.9, "v_threshold": 0.8, "v_reset": v_reset, "kind": kind}
        yield (x, torch.ones(4), None), grads, options


def quarters(dtype):
    """Three steps of multiples of 1/4, which are exact in binary, so that h == v_threshold really
    happens.
    """
    values = itertools.product([0.0, 0.25, 0.5, 1.0], repeat=3)
    return torch.tensor(list(values), dtype=dtype).T.contiguous()


def by_hand(inputs, grads, *, kind="triangle", alpha=1.0, **constants):
    x, gain, v_init, grad_spikes, grad_v, grad_v_seq = (
        a.double().numpy() for a in (*inputs, *grads)
    )
    return dlif_bptt(
        x,
        gain,
        v_init,
        kind=kind,
        alpha=alpha,
        grad_spikes=grad_spikes,
        grad_v=grad_v,
        grad_potentials=grad_v_seq,
        **constants,
    )
