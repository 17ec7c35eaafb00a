"""The table of calls that every kernel for GPUs is put through without one, against the reference.

Here the Triton kernels run in Triton's interpreter. Triton reads ``TRITON_INTERPRET`` when it is
imported, so this is a process of its own: ``TRITON_INTERPRET=1 python -m ops.triton.cases`` in
``tests/``; ``... cases 300`` adds so many calls at random.
"""

import functools
import itertools
import random
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from covering import pairwise
from ops.calls import assert_equal, check_slopes, laid_out, not_finite, quarters, random_call, run
from torch.testing import assert_close

from sj_robust.neuron import DLIFNode
from sj_robust.ops import dlif_multi_step
from sj_robust.ops.dlif import operator, triton_launch
from sj_robust.ops.dlif.operator import choose_backend

F32 = torch.float32
F16 = torch.float16
BF16 = torch.bfloat16
SIGMOID = ("sigmoid", 4.0)
ATAN = ("atan", 2.0)
CHOICES: dict[str, list[Any]] = {
    "steps": [1, 3, 5, 8, 15, 16, 17, 25, 33],
    "neurons": [1, 31, 128, 518, 1100],  # 1100: several programs, in both directions
    "dtype": [F32, F16, BF16],
    "v_reset": [0.0, None, -0.25],
    "detach_reset": [False, True],
    "surrogate": [("triangle", 1.0), ("triangle", 0.6), ATAN, SIGMOID],
    "starts": [False, True],  # from a potential of its own, whose gradient is wanted
    "stores": [False, True],  # the potentials, whose gradients are given
    "last": [False, True],  # the last potential gets a gradient
}
# Relative error of one rounding; the interpreter cuts bfloat16 off where a GPU rounds to nearest.
ROUNDING = {F32: 0.0, F16: 2.0**-11, BF16: 2.0**-7}


@dataclass(frozen=True)
class Case:
    """A call, by the names of CHOICES."""

    steps: int
    neurons: int
    dtype: torch.dtype = F32
    v_reset: float | None = 0.0
    detach_reset: bool = False
    surrogate: tuple[str, float] = ("triangle", 1.0)
    starts: bool = True
    stores: bool = True
    last: bool = True


FIRST = [  # small ones that notice most faults
    Case(17, 31, F32, -0.25, surrogate=SIGMOID),
    Case(25, 31, BF16, None, surrogate=ATAN),
    Case(3, 1100, F16, surrogate=("triangle", 0.6)),
    Case(5, 128, detach_reset=True, starts=False, stores=False),
]
LAST = Case(100, 31, F32, -0.25, surrogate=SIGMOID)


def at_random(draw: random.Random) -> Case:
    """One call."""
    return Case(*(draw.choice(values) for values in CHOICES.values()))


def cases() -> list[Case]:
    """Calls in which every pair of choices occurs, and one of a hundred steps; the same every
    time.
    """
    return [*pairwise(FIRST, at_random, 500), LAST]


def check(
    case: Case, inputs: Any = None, grads: Any = None, backend: str = "triton", **constants: Any
) -> None:
    """Spikes and potentials bit by bit, gradients to 1e-5 of the largest and one rounding of their
    format.
    """
    if inputs is None:
        shape = (case.steps, case.neurons)
        seed = case.steps + case.neurons
        inputs, grads = random_call(shape, case.dtype, seed=seed)
    x, gain, v_init = inputs
    inputs = x, gain, v_init if case.starts else None
    grads = grads[0], grads[1] if case.last else None, grads[2] if case.stores else None
    options = {
        "decay": 0.9,
        "v_threshold": 0.8,
        "v_reset": case.v_reset,
        "detach_reset": case.detach_reset,
        "kind": case.surrogate[0],
        "alpha": case.surrogate[1],
        "store_v_seq": case.stores,
        **constants,
    }
    outputs, gradients = run(backend, inputs, grads, **options)
    # the reference in float32, whose gradient is not rounded on the way
    wide = [widened(tensor) for tensor in (*inputs, *grads)]
    wanted, wanted_gradients = run("reference", wide[:3], wide[3:], **options)
    assert_equal([widened(tensor) for tensor in outputs], wanted)
    assert outputs[0].dtype == gradients[0].dtype == case.dtype
    for i, (found, expected) in enumerate(zip(gradients, wanted_gradients, strict=True)):
        if expected is not None and expected.numel():
            rounding = ROUNDING[case.dtype] if i == 0 else 0.0
            atol = 1e-5 * float(expected.abs().max())
            assert found.isfinite().all()
            assert_close(found.float(), expected, rtol=rounding, atol=atol)


def widened(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """In float32."""
    return None if tensor is None else tensor.float()


class Fenced:
    """torch as the launcher sees it: new tensors are not a number until a kernel writes them, nor
    is what is beside.
    """

    FENCE = 64

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype, device: Any, **layout: Any) -> torch.Tensor:
        size = torch.Size(shape if isinstance(shape[0], int) else shape[0])
        length = size.numel() + 2 * self.FENCE
        self.buffers.append(torch.full((length,), torch.nan, dtype=dtype, device=device))
        stride = torch.empty(size, device="meta", **layout).stride()
        return self.buffers[-1].as_strided(size, stride, self.FENCE)

    def empty_like(self, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.empty(like.shape, dtype=dtype or like.dtype, device=like.device)

    def check(self) -> None:
        for buffer in self.buffers:
            beside = torch.cat((buffer[: self.FENCE], buffer[-self.FENCE :]))
            assert beside.isnan().all(), "written outside of a tensor"
        self.buffers.clear()


def at_the_threshold(backend: str) -> None:
    """Neurons whose potential meets it exactly fire, as in the reference."""
    for v_reset, dtype in itertools.product((0.0, None), CHOICES["dtype"]):
        x = quarters(dtype)
        inputs = x, torch.ones(3), torch.zeros(64)
        grads = torch.ones_like(x), torch.full((64,), 0.5), torch.full((3, 64), 0.25)
        options = {"backend": backend, "decay": 0.5, "v_threshold": 1.0}
        check(Case(3, 64, dtype, v_reset), inputs, grads, **options)


def not_a_number(backend: str) -> None:
    """As in plain torch with an analytic gradient."""
    for inputs, grads, options in not_finite():
        with np.errstate(invalid="ignore", over="ignore"):  # the interpreter computes with numpy
            found, wanted = (run(name, inputs, grads, **options) for name in (backend, "eager"))
        assert_close(found, wanted, equal_nan=True)


def shapes(backend: str) -> None:
    """Nothing, images, channels last, a step repeated, and rows that are not aligned."""
    for shape in ((3, 0), (40, 0, 4), (2, 1, 1), (4, 2, 3, 5, 7)):
        case = Case(shape[0], 0, surrogate=ATAN)
        check(case, *random_call(shape, F32), backend)
    plain = torch.randn(4, 2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    repeated = plain[:1].expand(4, -1, -1, -1, -1)
    for x in (laid_out(plain, True), repeated, plain.flatten()[1:577].view(4, 2, 3, 4, 6)):
        call = functools.partial(dlif_multi_step, x, torch.ones(4), decay=0.9, store_v_seq=True)
        assert_equal(call(backend=backend), call(backend="reference"))


def slopes_by_formula(backend: str) -> None:
    """Every surrogate; the cases have some of them, since a kernel is the same with each."""
    with np.errstate(all="ignore"):
        check_slopes(backend)


SPECIAL = [at_the_threshold, slopes_by_formula, not_a_number, shapes]
"""What no table holds."""


def in_a_network(backend: str) -> None:
    """A neuron, step by step and in one go."""
    x = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0)) * 2
    results = []
    for name in (backend, "reference"):
        neuron = DLIFNode(3, tau=2.0, backend=name, store_v_seq=True)
        assert neuron.chosen_backend(x) == name
        leaf = x.clone().requires_grad_()
        (neuron(leaf) * x).sum().backward()
        found = [leaf.grad, neuron.input_gain.grad, neuron.v_seq.detach()]
        neuron.reset()
        neuron.step_mode = "s"
        results.append(found + [neuron(step).detach() for step in x])
    assert_close(*results)
    assert choose_backend("auto", x, neuron._surrogate()) != backend  # which is there for tests


def run_all(
    chosen: list[Any], check: Any, fenced: list[Any], apart: list[Any], launchers: Any, backend: str
) -> None:
    """Cases and whatever else runs with new tensors fenced, and then what runs without; says what
    is running.
    """
    fence = Fenced()
    for launcher in launchers:
        launcher.torch = fence
    parts = [functools.partial(check, case, backend=backend) for case in chosen]
    for part in (*(functools.partial(one, backend) for one in fenced), *parts):
        print(part, flush=True)
        part()
        fence.check()
    for launcher in launchers:
        launcher.torch = torch
    for one in apart:
        print(one, flush=True)
        one(backend)
    print(f"checked {len(chosen)} cases")


def main(more: int) -> None:
    """Run them all; AssertionError with what differs."""
    draw = random.Random(2)
    chosen = cases() + [at_random(draw) for _ in range(more)]
    run_all(chosen, check, SPECIAL, [in_a_network], [operator, triton_launch], "triton")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
