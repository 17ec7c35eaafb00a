"""Calls of batch norm, DLIF and pooling that are compared with the reference."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from covering import pairwise
from ops.calls import laid_out
from ops.triton.cases import ROUNDING
from torch import Tensor
from torch.testing import assert_close

from sj_robust.ops import Surrogate, dlif_multi_step
from sj_robust.ops.bn_dlif.config import BatchNorm, repeat_step
from sj_robust.ops.bn_dlif.dispatch import batch_norm_dlif_multi_step


@dataclass(frozen=True)
class Neuron:
    """How the neurons of a case are reset, and their surrogate."""

    v_reset: float | None = 0.0
    detach_reset: bool = False
    kind: str = "triangle"
    alpha: float = 1.0


TRIANGLE = Neuron()
SIGMOID = Neuron(v_reset=-0.25, kind="sigmoid", alpha=4.0)
F32 = torch.float32
F16 = torch.float16
BF16 = torch.bfloat16
CHOICES: dict[str, list[Any]] = {
    "steps": [1, 2, 5, 20],
    # of a step: odd planes, several programs, channels off their block, and no images
    "shape": [
        (2, 2, 4, 4),
        (3, 1, 5, 7),
        (1, 3, 2, 6),
        (1, 1, 24, 24),
        (7, 3),
        (2, 2, 3),
    ],
    "dtype": [F32, F16, BF16],
    "statistics": ["batch", "running", None],
    "average_pool": [False, True],
    "channels_last": [False, True],
    "repeated": [False, True],
    "neuron": [
        TRIANGLE,
        SIGMOID,
        Neuron(v_reset=None, kind="atan", alpha=2.0),
        Neuron(v_reset=None, detach_reset=True, alpha=0.6),
        Neuron(detach_reset=True, kind="atan", alpha=2.0),
    ],
    "affine": [False, True],
    "starts": [False, True],  # from a potential of its own, whose gradient is wanted
    "stores": [False, True],  # potentials and currents, whose gradients are given
}


@dataclass(frozen=True)
class Case:
    """A call, by the names of CHOICES."""

    steps: int
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    statistics: str | None = "batch"
    average_pool: bool = False
    channels_last: bool = False
    repeated: bool = False
    neuron: Neuron = TRIANGLE
    affine: bool = True
    starts: bool = True
    stores: bool = True


FIRST = [  # small ones that notice most faults
    Case(3, (2, 2, 3, 5), average_pool=True, neuron=SIGMOID),
    Case(2, (2, 3, 3, 4), BF16, "running", average_pool=True, channels_last=True),
    Case(25, (2, 2, 3), neuron=SIGMOID),
    Case(3, (2, 3, 2, 2), F16, channels_last=True, repeated=True),
]
LAST = Case(100, (3, 2), neuron=SIGMOID)


def at_random(draw: random.Random) -> Case:
    """One call; only images are pooled and have two orders in memory."""
    chosen = {name: draw.choice(values) for name, values in CHOICES.items()}
    case = Case(**chosen)
    if len(case.shape) == 4:
        return case
    return replace(case, average_pool=False, channels_last=False)


def cases() -> list[Case]:
    """Calls in which every pair of choices occurs, and one of a hundred steps; the same every
    time.
    """
    return [*pairwise(FIRST, at_random, 300), LAST]


class Call:
    """A case run by a backend in a dtype: outputs, gradients, running statistics; the numbers are
    always the same.
    """

    def __init__(self, backend: str, case: Case, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(case.steps + len(case.shape))
        self.state = torch.promote_types(dtype, torch.float32)
        T = case.steps
        N, C, *plane = case.shape

        image = self.normal(1 if case.repeated else T, N, C, *plane, scale=2.0, mean=0.5)
        self.x = laid_out(image.to(case.dtype).to(dtype), case.channels_last)
        gain = self.normal(T, scale=0.3, mean=1.0)
        weight = self.normal(C, scale=0.3, mean=1.0)
        bias = self.normal(C, scale=0.3, mean=1.0)
        v_init = self.normal(N, C, *plane, scale=0.4) if case.starts else None
        mean = self.normal(C, scale=0.2)
        variance = self.normal(C).abs() + 0.5
        self.running = [mean, variance]
        self.inputs = (gain, v_init)
        leaves = [self.x, gain]
        if case.affine and case.statistics:
            leaves += [weight, bias]
        else:
            weight = None
            bias = None
        if case.starts:
            leaves.append(v_init)
        for leaf in leaves:
            leaf.requires_grad_()

        norm = None
        x_seq = self.x.expand(T, *self.x.shape[1:])
        if case.statistics is not None:
            batch = case.statistics == "batch"
            norm = BatchNorm(weight, bias, mean, variance, use_batch_statistics=batch)
            x_seq = repeat_step(self.x, T) if case.repeated else self.x
        self.neuron = {
            "decay": 0.9,
            "v_threshold": 0.8,
            "v_reset": case.neuron.v_reset,
            "surrogate": Surrogate(case.neuron.kind, case.neuron.alpha),
        }
        self.outputs: tuple[Tensor | None, ...] = batch_norm_dlif_multi_step(
            x_seq,
            norm,
            gain,
            v_init,
            average_pool=case.average_pool,
            detach_reset=case.neuron.detach_reset,
            store_v_seq=case.stores,
            store_current=case.stores,
            backend=backend,
            **self.neuron,
        )
        there = [output for output in self.outputs if output is not None]
        used = [output for output in there if output.requires_grad]
        grads = []
        for output in used:
            grad = self.normal(*output.shape)
            if output is self.outputs[0]:
                grad = grad.to(case.dtype)
            grads.append(grad.to(output.dtype))
        self.gradients = torch.autograd.grad(used, leaves, grads)
        self.results: list[Tensor] = [*there, *self.gradients, *self.running]

    def normal(self, *size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """The next random numbers."""
        drawn = torch.randn(size, generator=self.generator)
        return (mean + scale * drawn).to(self.state)


def check(case: Case, backend: str) -> None:
    """Against the reference in double precision; neurons bit by bit, given the currents that the
    kernel has found.
    """
    found = Call(backend, case, case.dtype)
    wanted = Call("reference", case, torch.float64)
    assert found.outputs[0].dtype == found.gradients[0].dtype == case.dtype
    seen = found.gradients[0].stride()[1:]
    assert seen == found.x.stride()[1:], "as x lies in memory"
    spikes, *states = found.outputs
    exact, *others = wanted.outputs
    assert torch.equal(spikes.double(), exact), "spikes differ"
    for actual, expected in zip(
        [*states, *found.running],
        [*others, *wanted.running],
        strict=True,
    ):
        if expected is None:
            assert actual is None
        else:
            assert actual.dtype == torch.float32
            assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    check_gradients(case, found.gradients, wanted.gradients)
    if case.stores:
        _, v, v_seq, currents = (output.detach() for output in found.outputs)
        _, last, all_steps = dlif_multi_step(
            currents, *found.inputs, store_v_seq=True, backend="reference", **found.neuron
        )
        assert torch.equal(v, last), "last potentials differ"
        assert torch.equal(v_seq, all_steps), "potentials differ"


def check_gradients(case: Case, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """To 1e-5 of the largest; that of the input, which comes first, to its rounding too."""
    rounding = ROUNDING[case.dtype]
    tolerance = 1e-5
    if case.repeated and case.statistics is None and case.steps > 1:
        # where there is no batch norm, torch adds up what has been rounded at every step
        rounding *= case.steps
        tolerance = max(tolerance, rounding)
    for i, (actual, expected) in enumerate(zip(found, wanted, strict=True)):
        assert actual.isfinite().all()
        assert_close(
            actual.double(),
            expected,
            rtol=0.0 if i else rounding,
            atol=tolerance * float(expected.abs().max()),
        )
