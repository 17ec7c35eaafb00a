"""The operators in torch's registry: one path for calls with a tracer and without. Whole networks
under every tracer: tracers.py, of which the quick cells are run here.
"""

import gc
from functools import partial

import pytest
import torch
from covering import each_in_turn
from ops import tracers
from ops.calls import Seen, assert_equal, laid_out, needs_kernel, random_call, run
from spikingjelly.activation_based import surrogate
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from sj_robust.neuron import DLIFNode
from sj_robust.ops import Surrogate, dlif_multi_step
from sj_robust.ops.bn_dlif.config import BatchNorm
from sj_robust.ops.bn_dlif.dispatch import batch_norm_dlif_multi_step
from sj_robust.ops.dlif.config import DLIFConfig
from sj_robust.ops.dlif.operator import check_call
from sj_robust.ops.registration import Operator
from sj_robust.ops.surrogate import _CUSTOM

pytestmark = [
    needs_kernel,
    # opcheck of torch 2.15 looks at the gradients of copies
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]
NEURON = {
    "decay": 0.5,
    "v_threshold": 1.0,
    "v_reset": None,
    "surrogate": "atan",
    "alpha": 2.0,
    "detach_reset": False,
}
OPS = torch.ops.sj_robust


def call_of(backend):
    return {**NEURON, "backend": backend, "threads_per_block": None}


@pytest.mark.slow
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_torch_finds_no_fault_in_dlif(backend, store):
    (x, gain, v_init), (grad, grad_v, _) = random_call((3, 5), torch.float32)
    leaves = [t.requires_grad_() for t in (x, gain, v_init)]
    torch.library.opcheck(OPS.dlif, leaves, {**call_of(backend), "store_v_seq": store})
    v_init = v_init.detach() if store else None
    given = grad, grad_v, None, x.detach(), gain.detach(), v_init
    torch.library.opcheck(OPS.dlif_backward, given, {**call_of(backend), "needs_v_init": store})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statistics", "channels_last", "steps"),
    [("batch", False, 3), ("running", True, 3), (None, True, 3), ("batch", True, 1)],
)
def test_torch_finds_no_fault_in_batch_norm_and_dlif(statistics, channels_last, steps):
    (x, _, v_init), _ = random_call((steps, 2, 2, 4, 4), torch.float32)
    x = laid_out(x, channels_last)
    gain = torch.tensor([1.0, 0.5, 2.0])
    weight = bias = mean = variance = None
    if statistics is not None:
        weight, bias = torch.tensor([[1.0, 2.0], [0.1, 0.2]])
    if statistics == "running":
        mean = torch.zeros(2)
        variance = torch.ones(2)
    tensors = x, gain, v_init, weight, bias
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    stage = {
        **NEURON,
        "statistics": statistics,
        "eps": 1e-5,
        "average_pool": True,
        "channels_last": channels_last,
    }
    given = (*leaves, mean, variance), {**stage, "store_v_seq": True, "store_current": True}
    torch.library.opcheck(OPS.bn_dlif, *given)
    with torch.no_grad():
        *outputs, moments = OPS.bn_dlif(*given[0], **given[1])
    saved = x.detach(), gain.detach(), v_init.detach()
    grads = (*outputs, *saved, None if statistics is None else moments)
    needed = {"needs_x": True, "needs_v_init": True}
    torch.library.opcheck(OPS.bn_dlif_backward, grads, {**stage, **needed})


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_a_call_that_torch_is_asked_about_gives_the_same_bits(backend, monkeypatch):
    inputs, grads = random_call((3, 2, 5), torch.float32)
    plain = run(backend, inputs, grads, decay=0.9)
    asked = []

    def ask(operator, *tensors, **constants):
        asked.append(operator)
        return operator.overload(*tensors, **constants)

    monkeypatch.setattr(Operator, "__call__", ask)
    assert_equal(run(backend, inputs, grads, decay=0.9), plain)
    assert len(asked) == 2


def test_a_surrogate_of_ones_own_lives_as_long_as_its_graph():
    x = torch.randn(3, 5, requires_grad=True)
    gc.collect()  # what other tests left
    known = len(_CUSTOM)
    surrogate = Surrogate("custom", function=torch.sigmoid)
    call = {"decay": 0.5, "surrogate": surrogate, "backend": "eager"}
    spikes, _, _ = dlif_multi_step(x, torch.ones(3), **call)
    del surrogate, call
    spikes.sum().backward()
    del spikes
    gc.collect()
    assert x.grad.any()
    assert len(_CUSTOM) == known


QUICK = [
    "make_fx, real",
    "make_fx, fake",
    "FakeTensorMode",
    "torch.func.vmap",
    "torch.func.grad",
    "torch.func.jacrev",
    "create_graph=True",
    "zero tensor as gradient",
    "a dispatch mode",
]
REFUSED = {
    ("torch.func.grad", "cpp"),
    ("torch.func.grad", "eager"),
    ("torch.func.jacrev", "cpp"),
    ("torch.func.jacrev", "eager"),
}


@pytest.mark.parametrize("backend", ["cpp", "eager", "reference", "fused"])
@pytest.mark.parametrize("tracer", QUICK)
def test_a_network_under_a_tracer_gives_the_numbers_of_the_plain_call(tracer, backend):
    torch.manual_seed(0)
    if (tracer, backend) in REFUSED:
        with pytest.raises(ValueError, match=r"torch\.func\.grad.*backend='reference'"):
            tracers.run(tracer, backend)
    elif tracer == "create_graph=True" and backend != "reference":
        with pytest.raises(RuntimeError, match="differentiable once.*backend='reference'"):
            tracers.run(tracer, backend)
    else:
        tracers.run(tracer, backend)


@pytest.mark.parametrize("backend", ["cpp", "eager", "reference"])
def test_a_batch_of_gradients_is_refused_or_right(backend):
    x_seq = torch.rand(4, 2, 3)

    def spikes(x_seq):
        node = DLIFNode(T=4, backend=backend)
        with torch.no_grad():
            node.input_gain.mul_(3.0)
        return node(x_seq)

    jacobian = partial(torch.autograd.functional.jacobian, spikes, x_seq)
    if backend == "reference":
        assert jacobian().any()
        assert_close(jacobian(vectorize=True), jacobian())
    else:
        with pytest.raises(RuntimeError, match="no batch of gradients .*backend='reference'"):
            jacobian(vectorize=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # of torch, by itself
def test_a_compiled_package_runs_in_a_process_that_has_the_operators():
    tracers.run("AOTInductor, loaded by a new process", "cpp")


def test_a_mode_sees_the_operators_with_every_output():
    (x, gain, v_init), _ = random_call((3, 2, 2, 4, 4), torch.float32)
    norm = BatchNorm(torch.ones(2), torch.zeros(2), None, None, use_batch_statistics=True)
    asked = {"decay": 0.5, "store_v_seq": True, "backend": "cpp"}
    found = []
    for mode in (Seen(), None):
        leaf = x.clone().requires_grad_()
        if mode is not None:
            mode.__enter__()
        outputs = batch_norm_dlif_multi_step(
            leaf, norm, gain, v_init, average_pool=True, store_current=True, **asked
        )
        outputs += dlif_multi_step(leaf, gain, v_init, **asked)
        total = sum(output.square().sum() for output in outputs)
        found.append((*outputs, *torch.autograd.grad(total, leaf)))
        if mode is not None:
            mode.__exit__(None, None, None)
            names = [name for name in mode.names if name.startswith("sj_robust")]
    assert_equal(*found)
    order = ["bn_dlif", "dlif", "dlif_backward", "bn_dlif_backward"]
    assert names == [f"sj_robust::{name}" for name in order]


RECORDED = {
    "make_fx, real": lambda net, x: make_fx(net)(x),
    "make_fx, symbolic": lambda net, x: make_fx(
        net, tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(x),
    "torch.export": lambda net, x: torch.export.export(net, (x,), strict=False).module(),
}


class FromReset(torch.nn.Module):
    """A neuron that begins every call anew."""

    def __init__(self, **options):
        super().__init__()
        self.node = DLIFNode(3, tau=2.0, backend="eager", **options)
        torch.nn.init.uniform_(self.node.input_gain, 0.5, 1.5)

    def forward(self, x):
        self.node.reset()
        spikes = self.node(x)
        self.node.reset()
        return spikes


@pytest.mark.parametrize(("how", "v_reset"), each_in_turn(RECORDED, [0.0, 0.3, None]))
def test_a_recorded_neuron_runs_with_gradients_and_without(how, v_reset):
    torch.manual_seed(0)
    net = FromReset(v_reset=v_reset)
    x = torch.randn(3, 2, 4)
    other = torch.randn(3, 2, 4)
    with torch.set_grad_enabled(how != "torch.export"):
        graph = RECORDED[how](net, x)
    gain = next(graph.parameters(), net.node.input_gain)
    found = graph(other)
    wanted = net(other)
    assert torch.equal(found, wanted)
    (grad,) = torch.autograd.grad(found.sum(), gain)
    expected = torch.autograd.grad(wanted.sum(), net.node.input_gain)[0]
    assert_close(grad, expected)
    with torch.no_grad():
        assert torch.equal(graph(other), wanted)


@pytest.mark.parametrize("how", RECORDED)
def test_a_surrogate_of_ones_own_is_refused_before_a_graph_is_made(how):
    net = FromReset(surrogate_function=surrogate.LeakyKReLU())
    with pytest.raises(ValueError, match="backend='eager' .* surrogate is a Python function"):
        RECORDED[how](net, torch.randn(3, 2, 4))


def test_vmap_over_inputs_and_gains_and_with_a_surrogate_of_ones_own():
    (x, gain, _), _ = random_call((3, 5), torch.float32)
    own = Surrogate("custom", function=torch.sigmoid)
    xs = torch.stack([x, -x, 2 * x], 1)
    gains = torch.stack([gain, 2 * gain, 0.5 * gain])
    for backend, slope in (("cpp", None), ("eager", None), ("auto", own)):

        def spikes(x, gain, backend=backend, slope=slope):
            return dlif_multi_step(x, gain, decay=0.5, surrogate=slope, backend=backend)[0]

        found = torch.func.vmap(spikes, (1, 0))(xs, gains)
        each = [spikes(xs[:, i], gains[i]) for i in range(3)]
        assert_close(found, torch.stack(each))
    with pytest.raises(ValueError, match="a Python function.*backend='reference'"):
        torch.func.vmap(lambda x: spikes(x, gain, "eager", own))(x[None])


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_odd_tensors_are_made_plain(backend):
    """Zeros without memory, and numbers that are negated when they are read."""
    x = torch.randn(3, 5)
    gain = torch.ones(3)
    for odd in (torch._efficientzerotensor(x.shape), torch._neg_view(torch.zeros_like(x))):
        leaf = x.clone().requires_grad_()
        spikes, _, _ = dlif_multi_step(leaf, gain, decay=0.5, backend=backend)
        assert not torch.autograd.grad(spikes, leaf, odd)[0].any()
    found = dlif_multi_step(torch._neg_view(-x), gain, decay=0.5, backend=backend)
    assert_equal(found, dlif_multi_step(x, gain, decay=0.5, backend=backend))


def test_a_graph_refuses_tensors_that_its_kernel_would_misread():
    x = torch.zeros(3, 5)
    gain = torch.ones(3)
    call = {**call_of("cpp"), "store_v_seq": False}
    with pytest.raises(ValueError, match=r"must be torch.float32 there, got torch.float64"):
        OPS.dlif(x, gain.double(), None, **call)
    with pytest.raises(ValueError, match="there, got torch.float32 on meta"):
        check_call("cpp", DLIFConfig.of(**NEURON).surrogate, x, gain.to("meta"))
    with pytest.raises(ValueError, match="one value per step"):
        OPS.dlif(x, gain[:2], None, **call)
    with pytest.raises(ValueError, match="backend='cpp', which cannot run this call"):
        OPS.dlif(x.to(torch.float8_e4m3fn), gain, None, **call)


def test_autocast_leaves_potentials_in_float32():
    inputs, grads = random_call((3, 5), torch.bfloat16)
    plain = run("cpp", inputs, grads, decay=0.5)
    with torch.autocast("cpu", torch.bfloat16), Seen():
        traced = run("cpp", inputs, grads, decay=0.5)
    assert_equal(traced, plain)
    assert traced[0][1].dtype == torch.float32
