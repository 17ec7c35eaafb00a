"""Batch norm, DLIF and pooling in Triton's interpreter, on the CPU, against the reference; see
``cases.py``.

``TRITON_INTERPRET=1 python -m ops.triton.stage_cases`` in ``tests/``; a number behind it adds so
many calls at random.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from covering import pairwise
from ops.calls import assert_equal, laid_out, quarters
from ops.triton.cases import ROUNDING, run_all
from torch import Tensor, nn
from torch.testing import assert_close

from sj_robust.core.host import functional, layer
from sj_robust.neuron import DLIFNode, fuse
from sj_robust.ops import Surrogate, dlif_multi_step
from sj_robust.ops.bn_dlif import layer as one_layer
from sj_robust.ops.bn_dlif import triton_launch
from sj_robust.ops.bn_dlif.dispatch import batch_norm_dlif_multi_step, fused_kernels
from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.bn_dlif.repeated import repeat_step
from sj_robust.ops.dlif import triton_launch as dlif

CHOICES: dict[str, list[Any]] = {
    "steps": [1, 2, 5, 20],
    # of a step: odd planes, several programs, channels off their block, and no images
    "shape": [(2, 2, 4, 4), (3, 1, 5, 7), (1, 3, 2, 6), (1, 1, 24, 24), (7, 3), (2, 2, 3)],
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "statistics": ["batch", "running", None],
    "average_pool": [False, True],
    "channels_last": [False, True],
    "repeated": [False, True],
    "neuron": [
        (0.0, False, "triangle", 1.0),
        (-0.25, False, "sigmoid", 4.0),
        (None, False, "atan", 2.0),
        (None, True, "triangle", 0.6),
        (0.0, True, "atan", 2.0),
    ],  # reset, detached, surrogate
    "affine": [False, True],
    "starts": [False, True],  # from a potential of its own, whose gradient is wanted
    "stores": [False, True],  # potentials and currents, whose gradients are given
}
F32, F16, BF16 = CHOICES["dtype"]
TRIANGLE, SIGMOID, ATAN, *_ = CHOICES["neuron"]


@dataclass(frozen=True)
class Case:
    """A call, by the names of CHOICES."""

    steps: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    statistics: str | None
    average_pool: bool
    channels_last: bool
    repeated: bool
    neuron: tuple[float | None, bool, str, float]
    affine: bool = True
    starts: bool = True
    stores: bool = True


FIRST = [  # small ones that notice most faults
    Case(3, (2, 2, 3, 5), F32, "batch", True, False, False, SIGMOID),
    Case(2, (2, 3, 3, 4), BF16, "running", True, True, False, TRIANGLE),
    Case(25, (2, 2, 3), F32, "batch", False, False, False, SIGMOID),
    Case(3, (2, 3, 2, 2), F16, "batch", False, True, True, TRIANGLE),
]


def at_random(draw: random.Random) -> Case:
    """One call; only images are pooled and have two orders in memory."""
    case = Case(*(draw.choice(values) for values in CHOICES.values()))
    if len(case.shape) == 4:
        return case
    return replace(case, average_pool=False, channels_last=False)


def cases() -> list[Case]:
    """Calls in which every pair of choices occurs, and one of a hundred steps; the same every
    time.
    """
    return [
        *pairwise(FIRST, at_random, 300),
        Case(100, (3, 2), F32, "batch", False, False, False, SIGMOID),
    ]


class Call:
    """A case run by a backend in a dtype: outputs, gradients, running statistics; the numbers are
    always the same.
    """

    def __init__(self, backend: str, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(case.steps + len(case.shape))
        T = case.steps
        N, C, *plane = case.shape
        state = torch.promote_types(dtype, torch.float32)

        def normal(*size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            return (mean + scale * torch.randn(size, generator=generator)).to(device, state)

        image = normal(1 if case.repeated else T, N, C, *plane, scale=2.0, mean=0.5)
        x = laid_out(image.to(case.dtype).to(dtype), case.channels_last)
        gain, weight, bias = (normal(size, scale=0.3, mean=1.0) for size in (T, C, C))
        v_init = normal(N, C, *plane, scale=0.4) if case.starts else None
        self.running = [normal(C, scale=0.2), normal(C).abs() + 0.5]
        affine = [weight, bias] if case.affine and case.statistics else []
        leaves = [leaf.requires_grad_() for leaf in (x, gain, *affine, v_init) if leaf is not None]
        norm = None
        x_seq = x.expand(T, *x.shape[1:])
        if case.statistics is not None:
            batch = case.statistics == "batch"
            norm = BatchNorm(*(affine or (None, None)), *self.running, use_batch_statistics=batch)
            x_seq = repeat_step(x, T) if case.repeated else x
        v_reset, detach_reset, kind, alpha = case.neuron
        self.neuron = {
            "decay": 0.9,
            "v_threshold": 0.8,
            "v_reset": v_reset,
            "surrogate": Surrogate(kind, alpha),
        }
        self.x = x
        self.inputs = (gain, v_init)
        self.outputs: list[Any] = list(
            batch_norm_dlif_multi_step(
                x_seq,
                norm,
                *self.inputs,
                average_pool=case.average_pool,
                detach_reset=detach_reset,
                store_v_seq=case.stores,
                store_current=case.stores,
                backend=backend,
                **self.neuron,
            )
        )
        used = [output for output in self.outputs if output is not None and output.requires_grad]
        grads = [
            normal(*output.shape).to(case.dtype if i == 0 else state)
            for i, output in enumerate(used)
        ]
        self.gradients = torch.autograd.grad(
            used, leaves, [g.to(o.dtype) for g, o in zip(grads, used, strict=True)]
        )

        self.results: list[Tensor] = [
            *(a for a in self.outputs if a is not None),
            *self.gradients,
            *self.running,
        ]


def check(case: Case, device: str = "cpu", *, backend: str = "triton") -> None:
    """Against the reference in double precision; neurons bit by bit, given the currents that the
    kernel has found.
    """
    found = Call(backend, case, case.dtype, device)
    wanted = Call("reference", case, torch.float64, device)
    assert found.outputs[0].dtype == found.gradients[0].dtype == case.dtype
    seen = found.gradients[0].stride()[1:]
    assert seen == found.x.stride()[1:], "as x lies in memory"
    assert torch.equal(found.outputs[0].double(), wanted.outputs[0]), "spikes differ"
    pairs = zip(
        (*found.outputs[1:], *found.running), (*wanted.outputs[1:], *wanted.running), strict=True
    )
    for actual, expected in pairs:
        if expected is None:
            assert actual is None
        else:
            assert actual.dtype == torch.float32
            assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    # where there is no batch norm, torch adds up what has been rounded at every step
    rounding = ROUNDING[case.dtype] * (
        case.steps if case.repeated and case.statistics is None else 1
    )
    for i, (actual, expected) in enumerate(zip(found.gradients, wanted.gradients, strict=True)):
        scale = float(expected.abs().max())
        assert actual.isfinite().all()
        atol = 1e-5 * scale if rounding == ROUNDING[case.dtype] else rounding * scale
        assert_close(actual.double(), expected, rtol=0.0 if i else rounding, atol=atol)
    if case.stores:
        _, v, v_seq, currents = (output.detach() for output in found.outputs)
        _, *exact = dlif_multi_step(
            currents, *found.inputs, store_v_seq=True, backend="reference", **found.neuron
        )
        assert torch.equal(v, exact[0]), "last potentials differ"
        assert torch.equal(v_seq, exact[1]), "potentials differ"


def at_the_threshold(backend: str) -> None:
    """Neurons whose potential meets it exactly fire, as in the reference."""
    x = quarters(torch.float32).view(3, 1, 1, 8, 8)
    options = {"average_pool": True, "decay": 0.5, "v_threshold": 1.0}
    found, wanted = (
        batch_norm_dlif_multi_step(x, None, torch.ones(3), backend=name, **options)
        for name in ("triton", "reference")
    )
    assert_equal(found, wanted)


def a_large_mean(backend: str) -> None:
    """Sums of distances to a number nearby cancel nothing."""
    x = 1000 + 0.25 * torch.randn(3, 2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    norm = BatchNorm(
        None, None, mean := torch.zeros(2), variance := torch.ones(2), True, momentum=1.0
    )
    batch_norm_dlif_multi_step(x, norm, torch.ones(3), decay=0.9, backend="triton")
    wanted = x.double().transpose(0, 2).flatten(1)
    assert_close(mean.double(), wanted.mean(1), rtol=1e-7, atol=0)
    assert_close(variance.double(), wanted.var(1), rtol=1e-5, atol=0)


@contextmanager
def launched() -> Iterator[list[str]]:
    """Names of the kernels that run meanwhile."""
    names = []
    launch = dlif.launch

    def noted(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    dlif.launch = noted
    try:
        yield names
    finally:
        dlif.launch = launch


def in_a_network(backend: str) -> None:
    """A network that :func:`fuse` has changed runs in one pass and gives the numbers of the one
    that it was.
    """
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(
            layer.BatchNorm2d(2), DLIFNode(2, tau=2.0, backend="triton"), layer.AvgPool2d(2)
        )
        functional.set_step_mode(net, "m")
        if fused:
            fuse(net)
        x = torch.randn(2, 2, 2, 4, 4, requires_grad=True)
        with launched() as names:
            spikes = net(x)
            (spikes * torch.randn_like(spikes)).sum().backward()
            functional.reset_net(net)
            with torch.no_grad():
                evaluated = net.eval()(x)
        evaluation = ["bn_moments", "bn_dlif_forward"]
        training = [
            "bn_statistics",
            *evaluation,
            "bn_dlif_backward",
            "bn_finish",
            "bn_dlif_backward",
        ]
        assert names == (
            [*training, *evaluation] if fused else ["dlif_forward", "dlif_backward", "dlif_forward"]
        )
        results.append(
            [spikes, evaluated, x.grad, *(p.grad for p in net.parameters()), *net.buffers()]
        )
    assert_close(*results)


def what_runs_apart(backend: str) -> None:
    """Nothing, layouts with gaps and wide numbers: auto takes several passes, the backend by name
    says why.
    """
    norm = BatchNorm(None, None, torch.zeros(3), torch.ones(3), False)
    for x, reason in (
        (torch.zeros(2, 0, 3, 4, 4), "x_seq is empty"),
        (torch.zeros(2, 2, 3, 4, 4).transpose(3, 4), "contiguous or channels last"),
        (torch.zeros(2, 2, 3, 4, 4).double(), "must be float32, float16 or bfloat16"),
    ):
        assert fused_kernels(x, norm, Surrogate(), backend="triton") is None
        with pytest.raises(ValueError, match=f"backend='triton' cannot run this call: .*{reason}"):
            batch_norm_dlif_multi_step(x, norm, torch.ones(2), decay=0.5, backend="triton")


def main(more: int) -> None:
    """Run them all; AssertionError with what differs."""
    draw = random.Random(2)
    chosen = cases() + [at_random(draw) for _ in range(more)]
    triton_launch._PROGRAMS = (
        4  # so that small layers have several tiles in a program of the statistics
    )
    apart = [in_a_network, what_runs_apart]
    fenced = [at_the_threshold, a_large_mean]
    launchers = [one_layer, triton_launch]
    run_all(chosen, check, fenced, apart, launchers, "triton")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
