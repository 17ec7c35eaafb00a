"""The table of calls that every backend of DLIF, and of batch norm, DLIF and pooling, is put
through.
"""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from covering import pairwise
from oracle import dlif_bptt, surrogate_derivative
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from sj_robust.ops import Surrogate, dlif_multi_step
from sj_robust.ops.bn_dlif import dispatch, reference
from sj_robust.ops.bn_dlif.config import BatchNorm, StageOutputs, repeat_step
from sj_robust.ops.dlif import cpp
from sj_robust.ops.dlif.config import HOST_NAMES, DLIFConfig

needs_kernel = pytest.mark.skipif(
    cpp.unavailable_reason() is not None, reason=str(cpp.unavailable_reason())
)
KERNELS = [f"cpp {name}" for name in cpp.instruction_sets()]
"""The compiled kernel with every instruction set of this processor."""
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# Relative error of one rounding; Triton's interpreter cuts bfloat16 off where a GPU rounds.
ROUNDING = {F64: 0.0, F32: 0.0, F16: 2.0**-11, BF16: 2.0**-7}
assert_equal = functools.partial(assert_close, rtol=0, atol=0, equal_nan=True)
"""That two tensors, or sequences of tensors and None, are the same numbers in the same dtype."""


@dataclass(frozen=True)
class Case:
    """A row of the table: a call and which of its gradients are wanted.

    Attributes:
        shape: Of a step.
        starts: From a potential of its own, whose gradient is wanted.
        stores: All potentials, and a stage's currents, whose gradients are given.
        last: The last potential gets a gradient.
        layout: How a step lies in memory: plain, channels_last, strided or offset.
        repeated: One step stands for all.
        stage: Batch norm with statistics of the "batch" or "running" ones, or "none" of it, before
            the neurons; None is DLIF alone.
        affine: Whether the batch norm has weight and bias.
        pool: Whether spikes are averaged over 2x2 neurons.
    """

    steps: int
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    v_reset: float | None = 0.0
    detach_reset: bool = False
    surrogate: tuple[str, float] = ("triangle", 1.0)
    starts: bool = True
    stores: bool = True
    last: bool = True
    layout: str = "plain"
    repeated: bool = False
    stage: str | None = None
    affine: bool = True
    pool: bool = False

    @property
    def adds_rounded(self):
        """Whether torch adds up gradients of steps that have been rounded."""
        return self.repeated and self.stage in (None, "none") and self.steps > 1

    @property
    def neuron(self):
        """Constants of the neurons."""
        return {
            "decay": 0.9,
            "v_threshold": 0.8,
            "v_reset": self.v_reset,
            "detach_reset": self.detach_reset,
            "surrogate": Surrogate(*self.surrogate),
        }


NEURONS = {
    "dtype": [F32, F16, BF16],
    "v_reset": [0.0, None, -0.25],
    "detach_reset": [False, True],
    "surrogate": [("triangle", 1.0), ("triangle", 0.6), ("atan", 2.0), ("sigmoid", 4.0)],
    "starts": [False, True],
    "stores": [False, True],
    "last": [False, True],
}
ALONE = NEURONS | {
    "steps": [1, 3, 5, 8, 15, 16, 17, 25, 33],
    "shape": [(1,), (31,), (128,), (518,), (1100,)],  # 1100: several programs of a GPU
}
MORE = [(1, 2, 24, 16), (2, 200, 3, 6), (7, 3), (40, 130), (2, 2, 3)]
STAGES = NEURONS | {
    "steps": [1, 2, 5, 20],
    # odd planes, rows longer than a block, channels off a block and more than it has, no images
    "shape": [(2, 2, 4, 4), (3, 1, 5, 7), (1, 3, 2, 6), (1, 2, 3, 150), (2, 70, 4, 2), *MORE],
    "dtype": [F32, F16, BF16, F64],
    "layout": ["plain", "channels_last"],
    "repeated": [False, True],
    "stage": ["batch", "running", "none"],
    "affine": [False, True],
    "pool": [False, True],
}
FIRST = [  # small ones that notice most faults
    Case(17, (31,), F32, -0.25, surrogate=("sigmoid", 4.0)),
    Case(25, (31,), BF16, None, surrogate=("atan", 2.0)),
    Case(3, (1100,), F16, surrogate=("triangle", 0.6)),
    Case(5, (128,), detach_reset=True, starts=False, stores=False),
]
SPECIAL = [  # many steps, nothing, images, a step repeated, rows that are not aligned
    Case(100, (31,), F32, -0.25, surrogate=("sigmoid", 4.0)),
    Case(3, (0,)),
    Case(40, (0, 4), F16),
    Case(4, (2, 3, 5, 6), layout="channels_last"),
    Case(4, (2, 3, 5, 6), layout="strided", v_reset=None),
    Case(4, (2, 3, 4, 6), BF16, layout="offset"),
    Case(4, (2, 3, 5, 6), repeated=True),
]
LARGE = [  # several blocks and units, sums of many terms, rows of whole vectors and others
    Case(4, (63,), F64, None),
    Case(4, (257,), F64, -0.25),
    Case(2, (20_000,), F16),
    Case(3, (70_001,)),
    Case(1500, (70,)),
    Case(2, (4, 33, 8, 8), BF16, layout="channels_last", stage="batch"),
    Case(2, (4, 64, 32, 32), BF16, stage="batch", last=False),  # written past the cache
    Case(2, (4, 64, 32, 32), stage="batch", starts=False, stores=False),
    Case(2, (1, 3, 128, 513), stage="batch", starts=False, stores=False, last=False),
]


def at_random(choices, draw):
    """One call; only images are pooled and have two orders in memory."""
    case = Case(**{name: draw.choice(values) for name, values in choices.items()})
    if case.stage and len(case.shape) < 4:
        return replace(case, pool=False, layout="plain")
    return case


TABLE = [*pairwise(FIRST, functools.partial(at_random, ALONE), 500), *SPECIAL]
"""Calls of DLIF alone in which every pair of choices occurs."""
STAGE_TABLE = pairwise([], functools.partial(at_random, STAGES), 500)
"""The same of batch norm, DLIF and pooling."""


class Results(NamedTuple):
    """What comes out, by name: outputs, gradients of the inputs, running statistics."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    running: list[Tensor]

    def listed(self):
        """All of it."""
        return [*self.outputs.values(), *self.gradients.values(), *self.running]


class Drawn:
    """Random numbers of a case, which are always the same, and are rounded where it rounds them."""

    def __init__(self, case, dtype=None, device="cpu"):
        self.case = case
        self.dtype = dtype or case.dtype
        self.state = torch.promote_types(self.dtype, F32)
        self.device = device
        self.generator = torch.Generator().manual_seed(case.steps + sum(case.shape))
        T = case.steps
        shape = case.shape
        channels = shape[1] if case.stage else 1
        scale, mean = (2.0, 0.5) if case.stage in ("batch", "running") else (0.8, 0.3)
        x = self.normal(1 if case.repeated else T, *shape, scale=scale, mean=mean).to(case.dtype)
        self.leaves = {"x": laid_out(x.to(self.dtype), case.layout)}
        self.leaves["gain"] = self.normal(T, scale=0.3, mean=1.0)
        if case.starts:
            self.leaves["v_init"] = self.normal(*shape, scale=0.4, mean=0.2)
        affine = [self.normal(channels, scale=0.3, mean=1.0) for _ in range(2)]
        if case.stage in ("batch", "running") and case.affine:
            self.leaves["weight"], self.leaves["bias"] = affine
        variance = self.normal(channels).abs() + 0.5
        self.running = [self.normal(channels, scale=0.2), variance]
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def normal(self, *size, scale=1.0, mean=0.0):
        """The next ones, in the dtype of potentials."""
        drawn = mean + scale * torch.randn(size, generator=self.generator, dtype=F64)
        narrow = F64 if self.case.dtype == F64 else F32
        return drawn.to(narrow).to(self.device, self.state)

    def outputs(self, backend):
        """Those of the call, by name."""
        case = self.case
        x = self.leaves["x"]
        given = self.leaves["gain"], self.leaves.get("v_init")
        call = {**case.neuron, "store_v_seq": case.stores, "backend": backend}
        if case.stage is None:
            x_seq = x.expand(case.steps, *x.shape[1:])
            found = dlif_multi_step(x_seq, *given, **call)
        else:
            norm = None
            x_seq = repeat_step(x, case.steps) if case.repeated else x
            if case.stage == "none":
                x_seq = x.expand(case.steps, *x.shape[1:])
            else:
                of_norm = self.leaves.get("weight"), self.leaves.get("bias"), *self.running
                norm = BatchNorm(*of_norm, use_batch_statistics=case.stage == "batch")
            stage = {"average_pool": case.pool, "store_current": case.stores}
            found = stage_multi_step(x_seq, norm, *given, **call, **stage)
        named = zip(("spikes", "v", "v_seq", "current"), found, strict=False)
        return {name: output for name, output in named if output is not None}

    def results(self, backend):
        """Outputs and gradients."""
        outputs = self.outputs(backend)
        used = dict(outputs)
        if not self.case.last:
            del used["v"]
        grads = []
        for name, output in used.items():
            rounded = self.case.dtype if name == "spikes" else self.state
            grads.append(self.normal(*output.shape).to(rounded).to(output.dtype))
        found = torch.autograd.grad(list(used.values()), list(self.leaves.values()), grads)
        gradients = dict(zip(self.leaves, found, strict=True))
        outputs = {name: output.detach() for name, output in outputs.items()}
        return Results(outputs, gradients, self.running)


def stage_multi_step(
    x_seq,
    norm,
    gain,
    v_init=None,
    *,
    surrogate=None,
    backend="auto",
    average_pool=False,
    store_v_seq=False,
    store_current=False,
    **neuron,
):
    """Batch norm, DLIF and pooling in one pass where it can be, else one after the other."""
    surrogate = surrogate or Surrogate()
    if dispatch.runs_in_one_pass(x_seq, norm, surrogate, average_pool, backend):
        usual = {"v_threshold": 1.0, "v_reset": 0.0, "detach_reset": False}
        return dispatch.in_one_pass(
            x_seq,
            norm,
            gain,
            v_init,
            config=DLIFConfig(**usual | neuron, surrogate=surrogate),
            average_pool=average_pool,
            store_v_seq=store_v_seq,
            store_current=store_current,
        )
    assert backend != "cpp", "its kernel runs all of them in one pass"
    currents = x_seq if norm is None else reference.normalise(x_seq, norm)
    alone = {"surrogate": surrogate, "backend": backend, "store_v_seq": store_v_seq}
    spikes, v, v_seq = dlif_multi_step(currents, gain, v_init, **alone, **neuron)
    spikes = reference.pool(spikes) if average_pool else spikes
    return StageOutputs(spikes, v, v_seq, currents if store_current else None)


def results(backend, case, dtype=None, **on):
    """What a backend makes of a case in a dtype, its own by default."""
    return Drawn(case, dtype, **on).results(backend)


def laid_out(x_seq, layout):
    """The same numbers in another order in memory."""
    if layout == "channels_last":
        steps = x_seq.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return steps.unflatten(0, x_seq.shape[:2])
    if layout == "strided":
        return torch.stack([x_seq, x_seq], -1)[..., 0].detach()
    if layout == "offset":  # no vector load may begin there
        return torch.cat([x_seq.new_zeros(3), x_seq.flatten()])[3:].view(x_seq.shape).detach()
    return x_seq


def check(case, backend, **on):
    """Against the reference: spikes and potentials bit by bit, a stage's where rounding did not
    flip a spike; gradients to 1e-5 of the largest and one rounding of their format.
    """
    found = results(backend, case, **on)
    state = torch.promote_types(case.dtype, F32)
    for name, output in found.outputs.items():
        assert output.dtype == (case.dtype if name == "spikes" else state), name
    assert found.gradients["x"].dtype == case.dtype
    if case.stage and backend == "cpp" and not case.adds_rounded:
        memory_order = found.gradients["x"].stride()[1:]
        assert memory_order == Drawn(case).leaves["x"].stride()[1:], "as x lies in memory"
    if case.stage is None:
        wanted = results("reference", case, state, **on)
        same = torch.tensor(True)
        assert_equal(
            [output.to(state) for output in found.outputs.values()], [*wanted.outputs.values()]
        )
    else:
        wanted = results("reference", case, F64, **on)
        same = check_stage(case, found, wanted)
    check_gradients(case, found.gradients, wanted.gradients, same)
    if case.dtype in (F16, BF16) and backend == "cpp" and not case.adds_rounded:
        whole = results(backend, case, F32)
        rounded = zip(whole.listed(), found.listed(), strict=True)
        assert_equal(found.listed(), [one.to(other.dtype) for one, other in rounded])


def check_stage(case, found, wanted):
    """Outputs and running statistics; which neurons have the same spikes at every step."""
    drawn = Drawn(case)
    same = (found.outputs["spikes"] == wanted.outputs["spikes"]).all(0)
    assert same.double().mean() > 0.9999
    if case.pool:
        assert same.all()
        same = torch.tensor(True)
    close = 1e-12 if case.dtype == F64 else 1e-5
    for name, output in found.outputs.items():
        expected = wanted.outputs[name]
        if name != "spikes":
            right = torch.where(same, output.double(), expected)
            assert_close(right, expected, rtol=close, atol=close)
    assert_close([r.double() for r in found.running], wanted.running, rtol=close, atol=close)
    if case.stores:  # the same neurons, given the currents that the kernel has found
        alone = dlif_multi_step(
            found.outputs["current"],
            drawn.leaves["gain"].detach(),
            drawn.leaves["v_init"].detach() if case.starts else None,
            store_v_seq=True,
            backend="reference",
            **case.neuron,
        )
        assert_equal(found.outputs["v"], alone.v)
        assert_equal(found.outputs["v_seq"], alone.v_seq)
    return same


def check_gradients(case, found, wanted, same):
    """To 1e-5 of the largest; that of the input to its rounding too."""
    assert found.keys() == wanted.keys()
    tolerance = 1e-10 if case.dtype == F64 else 1e-5
    rounding = ROUNDING[case.dtype]
    if case.adds_rounded:
        rounding *= case.steps
        tolerance = max(tolerance, rounding)
    if not same.all():
        tolerance = 1e-3
    for name, gradient in found.items():
        expected = wanted[name].double()
        actual = gradient.double()
        assert actual.isfinite().all()
        if name in ("x", "v_init"):
            actual = torch.where(same.to(actual.device), actual, expected)
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        relative = rounding if name == "x" else 0.0
        assert_close(
            actual, expected, rtol=relative, atol=tolerance * largest, msg=f"{name}: {{}}".format
        )


# ---- what no table holds ----


def of_every_number(backend, dtype=F32, device="cpu"):
    """Derivatives of every surrogate at ordinary potentials and at extreme ones, by formula."""
    for kind, alpha in itertools.product(HOST_NAMES, ALPHAS):
        z = points(alpha).to(device, dtype)
        x = z[None].requires_grad_()
        neuron = {"decay": 0.5, "v_threshold": 0.0, "surrogate": Surrogate(kind, alpha)}
        gain = torch.ones(1, dtype=dtype, device=device)
        with np.errstate(all="ignore"):  # Triton's interpreter computes with numpy
            spikes, _, _ = dlif_multi_step(x, gain, backend=backend, detach_reset=True, **neuron)
            (found,) = torch.autograd.grad(spikes, x, torch.ones_like(x))
        check_slopes(kind, alpha, z, found[0])


ALPHAS = (2.0, 0.75)


def points(alpha):
    """Distances from the threshold: a range, kinks and beside them, tiny, large and infinite ones,
    not a number.
    """
    kinks = [0.0, 1e-30, 1 / alpha, 1 / alpha + 1e-3, 1 / alpha - 1e-3]
    edges = torch.tensor([*kinks, 20, 43, 1e3, 1e15, 1e30, torch.inf], dtype=F64)
    return torch.cat((edges, -edges, torch.tensor([torch.nan]), torch.linspace(-3, 3, 131)))


def check_slopes(kind, alpha, z, found):
    """Relative error at most 1e-12, in float32 1e-5; where the formula is a difference, of the
    height.
    """
    is_double = z.dtype == F64
    relative, absolute = (1e-12, 0.0) if is_double else (1e-5, 1e-37)
    if kind in ("triangle", "sigmoid"):
        absolute = alpha * (1e-15 if is_double else 1e-7)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = surrogate_derivative(kind, alpha, z.detach().cpu().double().numpy())
    np.testing.assert_allclose(
        found.cpu().numpy(), wanted, rtol=relative, atol=absolute, err_msg=f"{kind} of {alpha}"
    )


def quarters(dtype):
    """Three steps of multiples of 1/4, which are exact in binary, so that h == v_threshold really
    happens.
    """
    values = itertools.product([0.0, 0.25, 0.5, 1.0], repeat=3)
    return torch.tensor(list(values), dtype=dtype).T.contiguous()


def at_the_threshold(backend):
    """Neurons whose potential meets it exactly fire, as in numpy; multiples of 1/4 are exact."""
    values = list(itertools.product([0.0, 0.25, 0.5, 1.0], repeat=3))
    for v_reset, dtype in itertools.product((0.0, None), (F32, F16, BF16)):
        x = torch.tensor(values, dtype=dtype).T.contiguous()
        inputs = x, torch.ones(3), torch.zeros(64)
        grads = torch.ones_like(x), torch.full((64,), 0.5), torch.full((3, 64), 0.25)
        constants = {"decay": 0.5, "v_threshold": 1.0, "v_reset": v_reset, "detach_reset": False}
        expected = by_hand(inputs, grads, **constants)
        assert (expected.h == 1.0).sum() > 10
        (spikes, _, v_seq), (grad_x, *_) = run(backend, inputs, grads, **constants)
        np.testing.assert_array_equal(spikes.double(), expected.spikes)
        np.testing.assert_array_equal(v_seq, expected.potentials)
        atol = ROUNDING[dtype] * 4 + 1e-7
        np.testing.assert_allclose(grad_x.double(), expected.grad_x, atol=atol)


def not_finite(backend):
    """Not a number and infinity are as in plain torch with an analytic gradient."""
    x = torch.zeros(4, 70)
    for place, value in {3: torch.nan, 5: torch.inf, 7: -torch.inf, 69: torch.nan}.items():
        x[1, place] = value
    # said outright, since plain torch leaves out a None
    grads = torch.ones_like(x), torch.zeros(70), torch.zeros(4, 70)
    for kind, v_reset in itertools.product(("triangle", "atan", "sigmoid"), (0.0, None)):
        options = {"decay": 0.9, "v_threshold": 0.8, "v_reset": v_reset}
        call = (x, torch.ones(4), None), grads
        with np.errstate(invalid="ignore", over="ignore"):
            found, wanted = (
                run(name, *call, surrogate=Surrogate(kind), **options)
                for name in (backend, "eager")
            )
        spikes, v, _ = found[0]
        assert spikes[1, 5] == 1
        assert spikes[:, 3].sum() == 0
        assert v[[3, 69]].isnan().all()
        if backend != "reference":  # which multiplies an infinite potential by the 0 of a reset
            assert_close(found, wanted, equal_nan=True)


WITHOUT_TABLE = [at_the_threshold, of_every_number, not_finite]


# ---- one call of DLIF in float64 by default, run by a backend and by hand ----


def random_call(shape, dtype=F64, seed=0):
    """Currents, gain and first potential; and incoming gradients of the three outputs."""
    drawn = Drawn(Case(shape[0], shape[1:], dtype))
    drawn.generator.manual_seed(seed)
    x = drawn.normal(*shape, scale=0.8, mean=0.3).to(dtype)
    grad_spikes = drawn.normal(*shape).to(dtype)
    gain = drawn.normal(shape[0], scale=0.3, mean=1.0)
    v_init = drawn.normal(*shape[1:], scale=0.4, mean=0.2)
    return (x, gain, v_init), (grad_spikes, drawn.normal(*shape[1:]), drawn.normal(*shape))


def run(backend, inputs, grads, **options):
    """All outputs, and the gradients of the inputs that are there."""
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in inputs]
    outputs = dlif_multi_step(*leaves, store_v_seq=True, backend=backend, **options)
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(outputs, wanted, grads)
    return [output.detach() for output in outputs], gradients


def by_hand(inputs, grads, *, kind="triangle", alpha=1.0, **constants):
    """The same in float64 numpy."""
    x, gain, v_init, *of_outputs = (a.double().numpy() for a in (*inputs, *grads))
    names = ("grad_spikes", "grad_v", "grad_potentials")
    given = dict(zip(names, of_outputs, strict=True))
    return dlif_bptt(x, gain, v_init, kind=kind, alpha=alpha, **given, **constants)


class Seen(TorchDispatchMode):
    """Names of the operators that run meanwhile."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))
