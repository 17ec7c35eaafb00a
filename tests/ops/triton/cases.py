"""The Triton kernels in Triton's interpreter, on the CPU, against the reference: variants, and what
else may come.

Triton reads ``TRITON_INTERPRET`` when it is imported, so this runs in a process of its own:
``TRITON_INTERPRET=1 python -m ops.triton.cases`` in ``tests/``; ``... cases 300`` adds so many
calls at random.
"""

import functools
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from ops.calls import assert_equal, check_slopes, laid_out, not_finite, quarters, random_call, run
from torch._subclasses.fake_tensor import FakeTensorMode

from sj_robust.neuron import DLIFNode
from sj_robust.ops import choose_backend, dlif_multi_step
from sj_robust.ops.dlif import triton_launch

CHOICES: dict[str, list[Any]] = {
    "steps": [1, 2, 3, 5, 8, 15, 16, 17, 24, 25, 33],
    "neurons": [1, 31, 128, 517, 1100],  # 1100: several programs, in both directions
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "v_reset": [0.0, None, -0.25],
    "detach_reset": [False, True],
    "surrogate": [("triangle", 1.0), ("triangle", 0.6), ("atan", 2.0), ("sigmoid", 4.0)],
    "starts": [False, True],  # from a potential of its own, whose gradient is wanted
    "stores": [False, True],  # the potentials, whose gradients are given
    "last": [False, True],  # the last potential gets a gradient
}
# Relative error of one rounding; the interpreter cuts bfloat16 off where a GPU rounds to nearest.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


@dataclass(frozen=True)
class Case:
    """A call, by the names of CHOICES."""

    steps: int
    neurons: int
    dtype: torch.dtype
    v_reset: float | None
    detach_reset: bool
    surrogate: tuple[str, float]
    starts: bool
    stores: bool
    last: bool


FIRST = [  # small ones that notice most faults
    Case(17, 31, torch.float32, -0.25, False, ("sigmoid", 4.0), True, True, True),
    Case(25, 31, torch.bfloat16, None, False, ("atan", 2.0), True, True, True),
    Case(3, 1100, torch.float16, 0.0, False, ("triangle", 0.6), True, True, True),
    Case(5, 128, torch.float32, 0.0, True, ("triangle", 1.0), False, False, True),
    Case(2, 31, torch.float32, None, True, ("sigmoid", 4.0), False, True, False),
]


def pairs(case: Any) -> set[Any]:
    """Every pair of its choices."""
    return set(itertools.combinations(enumerate(astuple(case)), 2))


def pairwise(first: list[Any], at_random: Callable[[random.Random], Any], offers: int) -> list[Any]:
    """Calls in which every pair of choices that is offered occurs, behind the first those with most
    new ones.
    """
    draw = random.Random(1)
    offered = [(case, pairs(case)) for case in (at_random(draw) for _ in range(offers))]
    missing = set().union(*(found for _, found in offered)).difference(*map(pairs, first))
    chosen = list(first)
    while missing:
        case, found = max(offered, key=lambda offer: len(offer[1] & missing))
        chosen.append(case)
        missing -= found
    return chosen


def cases() -> list[Case]:
    """Calls in which every pair of choices occurs, and one of a hundred steps; the same every
    time.
    """
    chosen = pairwise(FIRST, at_random, 2000)
    found = set().union(*map(pairs, chosen))
    assert len(found) >= sum(
        len(a) * len(b) for a, b in itertools.combinations(CHOICES.values(), 2)
    )
    return [*chosen, Case(100, 31, torch.float32, -0.25, False, ("sigmoid", 4.0), True, True, True)]


def at_random(draw: random.Random) -> Case:
    """One call."""
    return Case(*(draw.choice(values) for values in CHOICES.values()))


def check(case: Case, inputs: Any = None, grads: Any = None, **constants: Any) -> None:
    """Spikes and potentials bit by bit, gradients to 1e-5 of the largest and one rounding of their
    format.
    """
    if inputs is None:
        inputs, grads = random_call(
            (case.steps, case.neurons), case.dtype, seed=case.steps + case.neurons
        )
    x, gain, v_init = inputs
    inputs = x, gain, v_init if case.starts else None
    grads = grads[0], grads[1] if case.last else None, grads[2] if case.stores else None
    kind, alpha = case.surrogate
    options = {
        "decay": 0.9,
        "v_threshold": 0.8,
        "v_reset": case.v_reset,
        "detach_reset": case.detach_reset,
        "kind": kind,
        "alpha": alpha,
        "store_v_seq": case.stores,
        **constants,
    }
    outputs, gradients = run("triton", inputs, grads, **options)
    # the reference in float32, whose gradient is not rounded on the way
    wide = [(a if a is None else a.float()) for a in (*inputs, *grads)]
    wanted, wanted_gradients = run("reference", wide[:3], wide[3:], **options)
    assert_equal([(a if a is None else a.float()) for a in outputs], wanted)
    assert outputs[0].dtype == gradients[0].dtype == case.dtype
    for i, (found, expected) in enumerate(zip(gradients, wanted_gradients, strict=True)):
        if expected is not None:
            rounding = ROUNDING[case.dtype] if i == 0 else 0.0
            scale = float(expected.abs().max()) if expected.numel() else 0.0
            assert found.isfinite().all()
            torch.testing.assert_close(found.float(), expected, rtol=rounding, atol=1e-5 * scale)


class Fenced:
    """torch as the launcher sees it: new tensors are not a number until a kernel writes them, nor
    is what is beside.
    """

    FENCE = 64

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(
        self,
        *shape: Any,
        dtype: torch.dtype,
        device: torch.device,
        memory_format: Any = torch.contiguous_format,
    ) -> torch.Tensor:
        size = torch.Size(shape if isinstance(shape[0], int) else shape[0])
        self.buffers.append(
            torch.full((size.numel() + 2 * self.FENCE,), torch.nan, dtype=dtype, device=device)
        )
        stride = torch.empty(size, device="meta", memory_format=memory_format).stride()
        return self.buffers[-1].as_strided(size, stride, self.FENCE)

    def empty_like(self, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.empty(like.shape, dtype=dtype or like.dtype, device=like.device)

    def check(self) -> None:
        for buffer in self.buffers:
            beside = torch.cat((buffer[: self.FENCE], buffer[-self.FENCE :]))
            assert beside.isnan().all(), "written outside of a tensor"
        self.buffers.clear()


def at_the_threshold() -> None:
    """Neurons whose potential meets it exactly fire, as in the reference."""
    for v_reset, dtype in itertools.product(CHOICES["v_reset"][:2], CHOICES["dtype"]):
        x = quarters(dtype)
        inputs = x, torch.ones(3), torch.zeros(64)
        grads = torch.ones_like(x), torch.full((64,), 0.5), torch.full((3, 64), 0.25)
        case = Case(3, 64, dtype, v_reset, False, ("triangle", 1.0), True, True, True)
        check(case, inputs, grads, decay=0.5, v_threshold=1.0)


def not_a_number() -> None:
    """As in plain torch with an analytic gradient."""
    for inputs, grads, options in not_finite():
        with np.errstate(invalid="ignore", over="ignore"):  # the interpreter computes with numpy
            found, wanted = (run(name, inputs, grads, **options) for name in ("triton", "eager"))
        torch.testing.assert_close(found, wanted, equal_nan=True)


def shapes() -> None:
    """Nothing, images, channels last, a step repeated, and rows that are not aligned."""
    for shape in ((3, 0), (40, 0, 4), (2, 1, 1), (4, 2, 3, 5, 7)):
        case = Case(shape[0], 0, torch.float32, 0.0, False, ("atan", 2.0), True, True, True)
        check(case, *random_call(shape, torch.float32))
    plain = torch.randn(4, 2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    for x in (
        laid_out(plain, True),
        plain[:1].expand(4, -1, -1, -1, -1),
        plain.flatten()[1:577].view(4, 2, 3, 4, 6),
    ):
        found, wanted = (
            dlif_multi_step(x, torch.ones(4), decay=0.9, store_v_seq=True, backend=name)
            for name in ("triton", "reference")
        )
        assert_equal(found, wanted)


def in_a_network() -> None:
    """A neuron, step by step and in one go; its operator under torch's own checks and in fake
    mode.
    """
    neurons = [
        DLIFNode(3, tau=2.0, backend=name, store_v_seq=True) for name in ("triton", "reference")
    ]
    x = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0)) * 2
    gradients = []
    for neuron in neurons:
        assert neuron.chosen_backend(x) == neuron.backend
        leaf = x.clone().requires_grad_()
        (neuron(leaf) * x).sum().backward()
        gradients.append([leaf.grad, neuron.input_gain.grad, neuron.v_seq.detach()])
        neuron.reset()
        neuron.step_mode = "s"
        gradients[-1] += [neuron(step).detach() for step in x]
        neuron.reset()
    torch.testing.assert_close(*gradients)
    (x, gain, v_init), _ = random_call((3, 5), torch.float32)
    leaves = [t.requires_grad_() for t in (x, gain, v_init)]
    torch.library.opcheck(
        torch.ops.sj_robust.dlif,
        (*leaves, 0.5, 1.0, None, "atan", 2.0, False, True, "triton", None),
    )
    with FakeTensorMode() as mode:
        spikes, _, _ = dlif_multi_step(
            mode.from_tensor(x), mode.from_tensor(gain), decay=0.5, backend="triton"
        )
    assert spikes.shape == x.shape
    assert (
        choose_backend("auto", x, neurons[0]._surrogate()) != "triton"
    )  # which the CPU has for tests alone


def slopes_by_formula() -> None:
    """Every surrogate; the cases have some of them, since a kernel is the same with each."""
    with np.errstate(all="ignore"):
        check_slopes("triton")


def run_all(
    chosen: list[Any],
    check: Callable[[Any], None],
    fenced: list[Any],
    apart: list[Any],
    launchers: Any,
) -> None:
    """Cases and whatever else runs with new tensors fenced, and then what runs without; says what
    is running.
    """
    fence = Fenced()
    for launcher in launchers:
        launcher.torch = fence
    for part in (*fenced, *(functools.partial(check, case) for case in chosen)):
        print(part, flush=True)
        part()
        fence.check()
    for launcher in launchers:
        launcher.torch = torch
    for part in apart:
        print(part, flush=True)
        part()
    print(f"checked {len(chosen)} cases")


def main(more: int) -> None:
    """Run them all; AssertionError with what differs."""
    draw = random.Random(2)
    chosen = cases() + [at_random(draw) for _ in range(more)]
    fenced = [at_the_threshold, slopes_by_formula, not_a_number, shapes]
    run_all(chosen, check, fenced, [in_a_network], [triton_launch])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
